"""How near to the processor's fastest matrix products a training step runs, and what the rest is.

    python benchmarks/roofline.py                 SmolLM2-135M on gsm rows
    python benchmarks/roofline.py --work smoke

The roofline: the useful multiplications of one micro-batch, counted from the shapes of the layers
(forward and both gradients of each linear layer, the head and what of the last layer follows
attention on targets alone, attention over the lower triangle), each at the rate that the fastest
library reaches on that very shape by itself. Elementwise work, memory traffic and anything computed
twice count nothing.
"""

import argparse
import time
from collections import defaultdict
from typing import Any

import torch

import bars
from prepared import prepared
from samestep.kernels.gemm import matmul, processor_name
from samestep.models.lm_head import row_wise_modules as parts_of
from works import WORKS


def best(function: Any, repeats: int = 5) -> float:
    """The least disturbed seconds of a call."""
    function()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def product_seconds(rows: int, inner: int, columns: int) -> tuple[float, float, float]:
    """Seconds of a linear layer's three products: by samestep's choice, by MKL; and GFLOP."""
    states, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    slope = torch.randn(rows, columns)
    pairs = [(states, weight.t()), (slope, weight), (slope.t(), states)]
    chosen = sum(best(lambda pair=pair: matmul(*pair)) for pair in pairs)  # type: ignore[misc]
    plain = sum(best(lambda pair=pair: pair[0] @ pair[1]) for pair in pairs)  # type: ignore[misc]
    return chosen, plain, 3 * 2e-9 * rows * inner * columns


def attention_seconds(lengths: list[int], config: Any) -> float:
    """Seconds of causal attention, forward and backward, of all layers."""
    from torch.nn.functional import scaled_dot_product_attention

    width = config.hidden_size // config.num_attention_heads
    total = 0.0
    for length in lengths:
        heads = [config.num_attention_heads] + 2 * [config.num_key_value_heads]
        q, k, v = (torch.randn(1, n, length, width, requires_grad=True) for n in heads)

        def both(q: Any = q, k: Any = k, v: Any = v) -> None:
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()

        total += best(both, 3)
    return total * float(config.num_hidden_layers)


def measure(work_name: str, budget: int) -> dict[str, Any]:
    """The roofline and the measured time of one micro-batch."""
    import samestep

    model, examples, cut, micros = prepared(WORKS[work_name], budget=budget)
    micro, positions = micros[0], cut[0]
    tokens = micro["input_ids"].numel()
    targets = len(micro["target_positions"])
    head = model.get_output_embeddings()
    narrow = {head, *(one for part in parts_of(model.model.layers[-1]) for one in part.modules())}
    shapes: dict[tuple[int, int, int], int] = defaultdict(int)
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            rows = targets if module in narrow else tokens
            shapes[rows, module.in_features, module.out_features] += 1
    products = [
        {"shape": shape, "layers": number, **_figures(shape)} for shape, number in shapes.items()
    ]
    roof = sum(one["seconds"] * one["layers"] for one in products)
    attention = attention_seconds([examples.lengths[at] for at in positions], model.config)
    loss = samestep.CausalLMLoss()
    seconds = best(lambda: samestep.backward(model, [micro], loss), 3)
    began, worked = time.perf_counter(), time.process_time()
    samestep.backward(model, [micro], loss)
    busy = (time.process_time() - worked) / (time.perf_counter() - began)
    with torch.profiler.profile() as profile:
        samestep.backward(model, [micro], loss)
    return {
        "parts": parts(model, micro, seconds),
        "around": around(model, examples, positions),
        "idle": max(0.0, 1 - busy / torch.get_num_threads()),
        "work": work_name,
        "processor": processor_name(),
        "tokens": tokens,
        "targets": targets,
        "threads": torch.get_num_threads(),
        "products": products,
        "product_seconds": roof,
        "attention_seconds": attention,
        "seconds": seconds,
        "share": (roof + attention) / seconds,
        "gflops": sum(one["gflop"] * one["layers"] for one in products) / roof,
        "gflops_of_mkl": sum(one["gflop"] * one["layers"] for one in products)
        / sum(one["seconds_of_mkl"] * one["layers"] for one in products),
        "profile": breakdown(profile),
    }


def parts(model: Any, micro: dict[str, Any], whole: float) -> dict[str, float]:
    """Seconds of a step's parts, each run by itself, forward and backward; and what is left.

    Args:
        model: As it is trained.
        micro: The micro-batch.
        whole: Seconds of the step on it.
    """
    from samestep.engine.targets import shifted_targets
    from samestep.losses.linear_cross_entropy import linear_cross_entropy

    layer, layers = model.model.layers[0], len(model.model.layers)
    states = torch.randn(*micro["input_ids"].shape, model.config.hidden_size, requires_grad=True)
    turned = model.model.rotary_emb(states, micro["position_ids"])
    borders = {name: value for name, value in micro.items() if name.startswith(("cu_", "max_"))}
    head = model.get_output_embeddings()
    targets = shifted_targets(micro)

    def attention() -> None:
        out = layer.self_attn(states, position_embeddings=turned, attention_mask=None, **borders)
        out[0].sum().backward()

    found = {
        "attention": layers * best(attention, 3),
        "MLP": layers * best(lambda: layer.mlp(states).sum().backward(), 3),
        "head": best(lambda: linear_cross_entropy(states, head.weight, targets).loss.backward(), 3),
    }
    return {**found, "norms, residuals, recomputation, autograd": whole - sum(found.values())}


def around(model: Any, examples: Any, positions: list[int]) -> dict[str, float]:
    """Seconds of what a step does beside its micro-batches: the update, and the data."""
    from samestep.data.batching import pack_micro_batches
    from samestep.data.collate import collate_examples

    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def data() -> None:
        pack_micro_batches(list(examples.lengths), micro_tokens=1024)
        collate_examples([examples[at] for at in positions])

    return {"optimizer and clipping, once a step": best(update, 3), "data": best(data, 3)}


def _figures(shape: tuple[int, int, int]) -> dict[str, float]:
    chosen, plain, work = product_seconds(*shape)
    return {"seconds": chosen, "seconds_of_mkl": plain, "gflop": work}


def breakdown(profile: Any) -> dict[str, float]:
    """Shares of the processor's time by kind of operation."""
    kinds = {
        "matrix products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::addmm_"),
        "attention": ("aten::_scaled_dot_product",),
        "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::fill_", "aten::zero_"),
        "softmax of the head": ("aten::_softmax", "aten::max"),
    }
    shares: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        kind = next((k for k, names in kinds.items() if event.key.startswith(names)), None)
        if kind is None:
            kind = "other operations" if event.key.startswith("aten::") else "Python and autograd"
        shares[kind] += event.self_cpu_time_total
    whole = sum(shares.values())
    return {kind: share / whole for kind, share in sorted(shares.items(), key=lambda p: -p[1])}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", choices=WORKS, default="gsm")
    parser.add_argument("--budget", type=int, default=1024)
    options = parser.parse_args()
    result = measure(options.work, options.budget)
    for kind, share in result["profile"].items():
        print(f"{share:6.1%}  {kind}")
    for part, seconds in (result["parts"] | result["around"]).items():
        print(f"{seconds:6.3f} s  {part}")
    print(f"{result['idle']:6.1%}  idle")
    print(
        f"{result['share']:.0%} of the roofline: products {result['product_seconds']:.2f} s "
        f"({result['gflops']:.0f} GFLOP/s; MKL {result['gflops_of_mkl']:.0f}), attention "
        f"{result['attention_seconds']:.2f} s, measured {result['seconds']:.2f} s"
    )
    if options.work == "gsm":
        bars.save(bars.file_of("roofline", result["processor"]), result)


if __name__ == "__main__":
    main()
