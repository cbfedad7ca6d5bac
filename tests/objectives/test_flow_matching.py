"""Flow matching: the formula's value under every split, and noise that belongs to examples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import gradients, worst
from diffusion import build_video, write_latents
from torch import Tensor

import samestep
from samestep.data.readers.latents import (
    LatentRecords,
    collate_latents,
    keyed_generator,
    latent_records,
    read_tensors,
)
from samestep.engine.counts import count_units
from samestep.engine.terms import Term
from samestep.errors import DataError
from samestep.objectives.flow_matching import FLOW_MATCHING_COUNTERS, FlowMatching, TimestepSampler

KEY = (5, 3)
SPLITS = [[7], [1], [3, 1, 2]]


def cut(records: LatentRecords, sizes: list[int], *, order: list[int] | None = None) -> list[Any]:
    left, turn, micros = list(order or range(len(records))), 0, []
    while left:
        size = sizes[turn % len(sizes)]
        micros.append(collate_latents(records, left[:size], key=KEY, time=TimestepSampler()))
        left, turn = left[size:], turn + 1
    return micros


def plain(model: Any, records: LatentRecords, normalize: str) -> Tensor:
    """The formula, each example alone."""
    dtype = next(model.parameters()).dtype
    total, divisor = torch.zeros((), dtype=dtype), 0.0
    for at, file in enumerate(records.files):
        one = {name: value.to(dtype) for name, value in read_tensors(file.path).items()}
        generator = keyed_generator(KEY, at)
        time = torch.rand((), generator=generator, dtype=torch.float64).to(dtype)
        x0 = one["latents"]
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64).to(dtype)
        seen = [(1 - time) * x0 + time * noise]
        seen.append(one.get("condition", x0[:0]))
        seen.append(x0.new_zeros(7 - sum(len(part) for part in seen), *x0.shape[1:]))
        full = "encoder_hidden_states_2" in one
        text, second = one["encoder_hidden_states"], one.get("encoder_hidden_states_2", x0)
        velocity = model(
            hidden_states=torch.cat(seen)[None],
            timestep=1000 * time[None],
            encoder_hidden_states=text[None],
            encoder_attention_mask=torch.ones(1, len(text)),
            encoder_hidden_states_2=second[None] if full else x0.new_zeros(1, 1, 10),
            encoder_attention_mask_2=torch.ones(1, len(second)) if full else torch.zeros(1, 1),
            image_embeds=one.get("image_embeds", x0.new_zeros(1, 8))[None],
        ).sample[0]  # fmt: skip
        errors = (velocity - (noise - x0)).square()
        total = total + file.weight * (errors.mean() if normalize == "example" else errors.sum())
        divisor += file.weight * (1 if normalize == "example" else errors.numel())
    return total / divisor


def records_of(folder: Path, *, full: bool = False, weighted: bool = False) -> LatentRecords:
    write_latents(folder / "latents", 7, full=full)
    if not weighted:
        return latent_records(str(folder / "latents"))
    rows = [{"file": f"latents/{at:03d}.safetensors", "weight": 0.5 + at} for at in range(7)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return latent_records(str(path))


def trained(gradient: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without weights whose gradient is nothing but rounding, such as that of a key's bias."""
    largest = max(float(value.norm()) for value in like.values())
    return {n: gradient[n] for n, value in like.items() if float(value.norm()) > 1e-9 * largest}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("normalize", ["example", "element"])
@pytest.mark.parametrize(("full", "weighted"), [(False, False), (True, True)])
def test_the_formula_under_every_split(
    tmp_path: Path, normalize: Any, full: bool, weighted: bool
) -> None:
    records, model = records_of(tmp_path, full=full, weighted=weighted), build_video()
    loss = plain(model, records, normalize)
    loss.backward()
    wanted = gradients(model)
    for sizes in SPLITS:
        order = list(range(7)) if sizes != SPLITS[-1] else [6, 2, 4, 0, 5, 1, 3]
        found, _ = samestep.backward(
            model,
            cut(records, sizes, order=order),
            FlowMatching(normalize),
            counters=FLOW_MATCHING_COUNTERS,
        )
        assert found == pytest.approx(loss.item(), rel=1e-12)
        assert worst(trained(gradients(model), wanted), trained(wanted, wanted)) < 1e-12


def test_float32(tmp_path: Path) -> None:
    records, model = records_of(tmp_path), build_video(torch.float32)
    found = []
    for sizes in SPLITS:
        samestep.backward(
            model, cut(records, sizes), FlowMatching(), counters=FLOW_MATCHING_COUNTERS
        )
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model).values()]))
    assert max(float((one - found[0]).norm() / found[0].norm()) for one in found[1:]) < 2e-6


@pytest.mark.parametrize("kind", ["mean of means", "noise of the micro-batch", "one shape's count"])
def test_wrong_steps_are_caught(tmp_path: Path, kind: str) -> None:
    records, model = records_of(tmp_path), build_video()
    plain(model, records, "example").backward()
    wanted = gradients(model)
    assert len({file.shape for file in records.files}) == 2
    micros, loss, counters = cut(records, [6, 1]), FlowMatching(), dict(FLOW_MATCHING_COUNTERS)

    def mean(model: Any, micro: Any) -> Term:
        own = count_units([micro], FLOW_MATCHING_COUNTERS)["example"]
        return Term(loss(model, micro)["velocity"].total / own, "part")

    if kind == "mean of means":
        samestep.backward(model, micros, mean, counters={"part": lambda _: 1.0})
    else:
        if kind == "noise of the micro-batch":
            for micro in micros:
                generator = torch.Generator().manual_seed(5)
                for group in micro["groups"].values():
                    group["noise"].normal_(generator=generator)
        else:
            counters["example"] = lambda micro: len(next(iter(micro["groups"].values()))["weights"])
        samestep.backward(model, micros, loss, counters=counters)
    assert worst(trained(gradients(model), wanted), trained(wanted, wanted)) > 1e-3


def test_noise_and_times_belong_to_seed_step_and_example(tmp_path: Path) -> None:
    records = records_of(tmp_path)

    def drawn(indices: list[int], key: tuple[int, int]) -> dict[int, Tensor]:
        micro, found = collate_latents(records, indices, key=key, time=TimestepSampler()), {}
        for name, group in micro["groups"].items():
            members = [at for at in indices if "x".join(map(str, records.files[at].shape)) == name]
            rows = zip(group["noise"].flatten(1), group["time"], strict=True)
            found |= {at: torch.cat([n, t[None]]) for at, (n, t) in zip(members, rows, strict=True)}
        return found

    alone, together = drawn([4], (1, 2)), drawn([6, 4, 0], (1, 2))
    assert torch.equal(alone[4], together[4])
    others = [drawn([4], (1, 3))[4], drawn([4], (2, 2))[4], together[0]]
    assert not any(torch.equal(alone[4][:4], other[:4]) for other in others)


def test_policies_of_time() -> None:
    def mean(times: TimestepSampler) -> float:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.stack([times(generator) for _ in range(2000)])
        assert 0 < drawn.min() < drawn.max() < 1
        return float(drawn.mean())

    assert mean(TimestepSampler()) == pytest.approx(0.5, abs=0.03)
    assert mean(TimestepSampler("logit_normal")) == pytest.approx(0.5, abs=0.03)
    # The mean of s t / (1 + (s - 1) t) over uniform t, by its integral.
    s = 3.0
    wanted = s / (s - 1) - s * torch.log(torch.tensor(s)).item() / (s - 1) ** 2
    assert mean(TimestepSampler(shift=s)) == pytest.approx(wanted, abs=0.03)


def test_npz_is_the_same(tmp_path: Path) -> None:
    one = latent_records(str(write_latents(tmp_path / "a", 3, full=True)))
    other = latent_records(str(write_latents(tmp_path / "b", 3, full=True, suffix=".npz")))
    for a, b in zip(one.files, other.files, strict=True):
        first, second = read_tensors(a.path), read_tensors(b.path)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "kind", ["damaged", "not finite", "no latents", "other tensors", "flat text"]
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    folder = write_latents(tmp_path / "latents", 3)
    bad = folder / "001.safetensors"
    tensors, message = read_tensors(bad), "001.safetensors: "
    if kind == "damaged":
        bad.write_bytes(b"no")
        message += f"{bad}: cannot be read"
    elif kind == "not finite":
        tensors["latents"][0, 0] = torch.nan
        message += "latents holds numbers that are not finite"
    elif kind == "no latents":
        tensors["image"] = tensors.pop("latents")
        message += "it holds no latents"
    elif kind == "other tensors":
        tensors["more"] = torch.ones(1)
        message = "all files must hold the same tensors, but 000.safetensors has"
    else:
        tensors["encoder_hidden_states"] = tensors["encoder_hidden_states"].flatten()
        message += "encoder_hidden_states must be [length, width]"
    if kind != "damaged":
        save_file({name: value.contiguous() for name, value in tensors.items()}, bad)
    with pytest.raises(DataError) as error:
        latent_records(str(folder))
    assert message in str(error.value)


def test_a_folder_without_latents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of latents"):
        latent_records(str(tmp_path))
