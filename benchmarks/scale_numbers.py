"""The numbers in docs/scale.md, from their formulas: memory a rank and communication a step.

python benchmarks/scale_numbers.py
"""

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Model:
    """A Llama-shaped model."""

    name: str
    parameters: float
    layers: int
    width: int
    vocabulary: int
    tied: bool = False

    def root(self) -> float:
        """The weights that belong to no block: the embedding, and the head."""
        return (1 if self.tied else 2) * self.vocabulary * self.width


MODELS = (
    Model("1 B (Llama 3.2 1B)", 1.24e9, 16, 2048, 128_256, tied=True),
    Model("8 B (Llama 3.1 8B)", 8.03e9, 32, 4096, 128_256),
    Model("70 B (Llama 3.1 70B)", 70.6e9, 80, 8192, 128_256),
)


def replicated_bytes(model: Model, *, weight: int, gradient: int, moment: int) -> float:
    """Weights, gradients (in float32 at least) and two Adam moments on every rank."""
    return model.parameters * (weight + gradient + 2 * moment)


def sharded_bytes(model: Model, *, ranks: int, weight: int, gradient: int, moment: int) -> float:
    """The same, shared out; and whole while a step runs: the root's group, and two blocks.

    A whole weight takes 2 bytes, its gradient 2, and the buffer that it is reduced in 4.
    """
    shared = replicated_bytes(model, weight=weight, gradient=gradient, moment=moment) / ranks
    block = (model.parameters - model.root()) / model.layers
    return shared + (model.root() + 2 * block) * (2 + 2 + 4)


def all_reduce_bytes(model: Model, *, ranks: int) -> float:
    """What each rank sends for replicated weights, once a step: a ring of float32 sums."""
    return 2 * (ranks - 1) / ranks * 4 * model.parameters


def fsdp_bytes(
    model: Model, *, ranks: int, micro_batches: int, weight: int, gradient: int
) -> float:
    """What each rank sends under fully_shard: gathered twice and scattered once a micro-batch."""
    return micro_batches * (ranks - 1) / ranks * model.parameters * (2 * weight + gradient)


def activation_bytes(model: Model, *, tokens: int, element: int, checkpointing: bool) -> float:
    """Activations of one micro-batch: 34 numbers a token, width and layer (arXiv:2205.05198),
    without the attention matrices that fused kernels never store; with checkpointing the input of
    each block, and one block's own."""
    one = 17 * element * tokens * model.width
    if checkpointing:
        return model.layers * element * tokens * model.width + one
    return model.layers * one


def table() -> str:
    """The table of docs/scale.md, in Markdown."""
    lines = [
        "| model | ddp, float32 | ddp, bfloat16 | fsdp2 on 8, mixed | fsdp2 on 64, mixed "
        "| ddp sends a step, 8 ranks | fsdp2 sends a micro-batch, 8 ranks |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in MODELS:
        cells = (
            replicated_bytes(model, weight=4, gradient=4, moment=4),
            replicated_bytes(model, weight=2, gradient=4, moment=2),
            sharded_bytes(model, ranks=8, weight=4, gradient=4, moment=4),
            sharded_bytes(model, ranks=64, weight=4, gradient=4, moment=4),
            all_reduce_bytes(model, ranks=8),
            fsdp_bytes(model, ranks=8, micro_batches=1, weight=2, gradient=4),
        )
        numbers = " | ".join(f"{cell / GB:,.1f} GB" for cell in cells)
        lines.append(f"| {model.name} | {numbers} |")
    return "\n".join(lines)


def activation_table() -> str:
    """Activations of a micro-batch of 2,048 tokens in bfloat16, without and with checkpointing."""
    lines = ["| model | kept | with gradient checkpointing |", "| --- | --- | --- |"]
    for model in MODELS:
        cells = [
            activation_bytes(model, tokens=2048, element=2, checkpointing=checkpointing) / GB
            for checkpointing in (False, True)
        ]
        lines.append(f"| {model.name} | {cells[0]:.1f} GB | {cells[1]:.1f} GB |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    print()
    print(activation_table())
