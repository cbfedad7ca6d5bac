"""The auditor's judgement of loops of accelerate and Lightning, plain and made exact."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional

import samestep
from samestep.doctor.loops import AccelerateLoop, LightningLoop
from samestep.errors import ConfigError, StepError
from samestep.loops.accelerate import windows
from samestep.loops.units import count_units, first_rows

AXES = ("micro-batch", "order", "zero-target")


@pytest.mark.parametrize("made", [AccelerateLoop, LightningLoop])
def test_the_guide_s_loop_averages_means_and_the_exact_one_does_not(made: Any) -> None:
    if made is LightningLoop:
        pytest.importorskip("lightning")
    plain, cured = made(), made(**{"windows" if made is AccelerateLoop else "exact": True})
    found = samestep.check(plain, axes=["micro-batch"]).axes[0]
    assert (found.verdict, found.cause) == ("inexact", "mean-of-means")
    report = samestep.check(cured, axes=AXES)
    assert {axis.name: axis.verdict for axis in report.axes} == dict.fromkeys(AXES, "exact")
    assert report.dtype == "float64"


def gradients(steps: int, sizes: list[int]) -> list[torch.Tensor]:
    """What each update of two epochs over these micro-batches is given."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    data = [torch.randn(size, 3, dtype=torch.float64) for size in sizes]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    for _ in range(2):
        for micro, factor in windows(loader, accelerator, unit="rows"):
            with accelerator.accumulate(model):
                accelerator.backward(model(micro).square().mean() * factor)
                if accelerator.sync_gradients:
                    seen.append(model.weight.grad.clone())
                optimizer.step()
                optimizer.zero_grad()
    return seen


def test_each_window_steps_once_and_the_short_last_one_by_its_own_count() -> None:
    sizes = [5, 1, 3, 2, 4]
    found = gradients(2, sizes)
    assert len(found) == 6, "three windows an epoch, two epochs"
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    data = [torch.randn(size, 3, dtype=torch.float64) for size in sizes]
    for at, window in enumerate([data[:2], data[2:4], data[4:]] * 2):
        model.zero_grad()
        model(torch.cat(window)).square().mean().backward()
        assert model.weight.grad is not None
        torch.testing.assert_close(found[at], model.weight.grad, rtol=1e-12, atol=0)
    assert (found[0] - gradients(1, sizes)[0]).norm() > 1e-3, "another effective batch"


def test_what_windows_refuses() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = torch.utils.data.DataLoader([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"accelerator\.prepare"):
        windows(plain, accelerator, unit="rows")
    with pytest.raises(ConfigError, match="unit='tokens'"):
        windows(plain, accelerator, unit="tokens")
    loader = accelerator.prepare(plain)
    accelerator.step = 1
    with pytest.raises(StepError, match="1 of 2 micro-batches"):
        next(windows(loader, accelerator, unit="rows"))
    accelerator.step = 0


def test_units() -> None:
    labels = torch.tensor([[1, -100, 3], [4, 5, -100]])
    micro = {"labels": labels, "name": "x"}
    assert [count_units(micro, unit) for unit in ("labels", "shifted-labels", "rows")] == [4, 2, 2]
    assert count_units(micro, lambda one: one["labels"].numel()) == 6
    with pytest.raises(StepError, match="tuple without a tensor 'labels'"):
        count_units((labels,), "labels")
    with pytest.raises(StepError, match="from 0 on"):
        count_units(micro, lambda _: -1)
    cut = first_rows({"labels": labels, "pair": (labels, 7)}, 1, 2)
    assert cut["labels"].shape == (1, 3)
    assert cut["pair"][0].shape == (1, 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of Lightning against typing_extensions
@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_lightning_leaves_out_what_the_module_leaves_out() -> None:
    lightning = pytest.importorskip("lightning")
    from samestep.loops.lightning import exact

    seen: list[torch.Tensor] = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            if batch_idx == 1:
                return None
            return {"loss": functional.mse_loss(self.net(batch), batch[:, :1])}

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.append(self.net.weight.grad.clone())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    rows = [torch.randn(size, 2, dtype=torch.float64) for size in (3, 2, 1, 4)]
    module = exact(Module().double(), unit=len)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", accumulate_grad_batches=4, logger=False, barebones=True
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None))
    whole = torch.cat([rows[0], rows[2], rows[3]])
    plain = Module().double()
    functional.mse_loss(plain.net(whole), whole[:, :1]).backward()
    torch.testing.assert_close(seen[0], plain.net.weight.grad, rtol=1e-12, atol=0)
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="by hand"):
        exact(module, unit="rows")
