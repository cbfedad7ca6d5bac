"""A tokenizer made in the test: byte-level, a few hundred tokens, no network."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The total number of forks is 16 + 3 = 19.",
    "How many forks were in the package that Emma bought?",
    "She hid 90 treats; her friends found 40 treats.",
    "Answer the question, then stop. Yes, of course.",
    "James has 475 euros and needs 405 more for the fair.",
]

_OPEN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
_PLAIN = "{{ m['content'] + '<|im_end|>' }}"
_TAGGED = (
    "{% if m['role'] == 'assistant' %}{%- generation -%}"
    + _PLAIN
    + "{%- endgeneration -%}{% else %}"
    + _PLAIN
    + "{% endif %}"
)
_TOOLS = "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
_CLOSE = (
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHAT = _TOOLS + _OPEN + _PLAIN + _CLOSE
CHAT_WITH_TAGS = _TOOLS + _OPEN + _TAGGED + _CLOSE


def build_tokenizer(
    *, add: str = "", pad: str = "<|pad|>", mask: str | None = None
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer.

    ``add`` names the special tokens that it puts around a text: "", "bos" or "bos eos".
    """
    special = ["<|bos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    template = {"": "$A", "bos": "<|bos|> $A", "bos eos": "<|bos|> $A <|im_end|>"}[add]
    if add:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<|bos|>", 0), ("<|im_end|>", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token=pad,
        mask_token=mask,
    )


@cache
def tiny_tokenizer(*, chat: bool = False, generation_tags: bool = False) -> PreTrainedTokenizerFast:
    """The shared tokenizer (do not change it): eos is <|im_end|>, nothing is added to a text.

    ``chat`` gives it a ChatML template, ``generation_tags`` one with {% generation %} tags.
    """
    tokenizer = build_tokenizer()
    if chat or generation_tags:
        tokenizer.chat_template = CHAT_WITH_TAGS if generation_tags else CHAT
    return tokenizer
