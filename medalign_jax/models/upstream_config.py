"""Reading a published ``config.json``: a key is read, known to be harmless, or refused."""

from collections.abc import Mapping
from typing import Any

from medalign_jax.core.errors import UserError


class ModelConfigError(UserError):
    """A model's ``config.json`` is malformed or asks for something that the model does not have."""


# Keys that transformers writes into any config.json and that cannot change a forward pass.
BOOKKEEPING = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "_num_labels",
        "architectures",
        "bos_token_id",
        "cache_implementation",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "language",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "name",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    }
)

_REQUIRED = object()
_LARGEST = 2**31 - 1  # what XLA counts an axis with
_MOST_LAYERS = 10_000


class ConfigReader:
    """Typed access to a config that remembers what was read, so that the rest can be refused.

    Args:
      config: the parsed JSON object. Untrusted: every value's type is checked.
      where: what to call it in messages, e.g. ``"config.json"`` or ``"config.json: text_config"``.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "config.json"):
        if not isinstance(config, Mapping):
            raise ModelConfigError(f"{where} has to be a JSON object, not {type(config).__name__}")
        self._config = config
        self._seen: set[str] = set()
        self.where = where

    def raw(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value as it stands; ``default`` where the key is absent."""
        self._seen.add(key)
        value = self._config.get(key, default)
        if value is _REQUIRED:
            raise ModelConfigError(f"{self.where} has no {key!r}, which this architecture needs")
        return value

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive whole number, no larger than an axis can be."""
        return self._whole(key, default, _LARGEST, "no model has sizes above")

    def depth(self, key: str, default: Any = _REQUIRED) -> int:
        """A number of layers; things are made for each before weights are looked at."""
        return self._whole(key, default, _MOST_LAYERS, "no model has more layers than")

    def _whole(self, key: str, default: Any, most: int, otherwise: str) -> int:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelConfigError(
                f"{self.where}: {key} is {value!r}; a positive integer is needed"
            )
        if value > most:
            raise ModelConfigError(f"{self.where}: {key} is {value}; {otherwise} {most}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive finite number."""
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e38:
            raise ModelConfigError(f"{self.where}: {key} is {value!r}; a positive number is needed")
        return float(value)

    def flag(self, key: str, default: bool | None) -> bool | None:
        """True or false; null counts as absent."""
        value = self.raw(key, default)
        if value is not None and not isinstance(value, bool):
            raise ModelConfigError(f"{self.where}: {key} is {value!r}; true or false is needed")
        return default if value is None else value

    def only(self, key: str, supported: tuple, default: Any) -> Any:
        """A setting of which only some values are supported; any other is refused by name."""
        value = self.raw(key, default)
        if value not in supported:
            raise ModelConfigError(
                f"{self.where}: {key}={value!r} is not supported "
                f"(supported: {', '.join(map(repr, supported))})"
            )
        return value

    def ignore(self, *keys: str) -> None:
        """Names keys that cannot change what this model computes."""
        self._seen.update(keys)

    def finish(self) -> None:
        """Refuses what nobody read. A feature that is switched off (null, false, empty) may stay.

        Raises:
          ModelConfigError: naming every key left over, with its value.
        """
        left = {
            key: value
            for key, value in self._config.items()
            if key not in self._seen
            and key not in BOOKKEEPING
            and value not in (None, False, {}, [])
        }
        if left:
            named = ", ".join(f"{key}={str(value)[:60]}" for key, value in sorted(left.items()))
            raise ModelConfigError(
                f"{self.where} asks for features that this model does not have: {named}. "
                "Loading it all the same would give silently different numbers; "
                "use a checkpoint without them"
            )
