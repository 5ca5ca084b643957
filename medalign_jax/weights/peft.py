"""LoRA adapters in the file layout of Hugging Face's PEFT, written and read strictly.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` with, for each adapted
linear layer of the base model, ``base_model.model.MODULE.lora_A.weight`` (rank, in) and
``base_model.model.MODULE.lora_B.weight`` (out, rank), MODULE being the layer's upstream name
(``model.layers.0.self_attn.q_proj``), which the base model's mapping table knows. So
``peft.PeftModel.from_pretrained(model, folder)`` gives in PyTorch what was trained here.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medalign_jax.core.files import write_whole
from medalign_jax.core.seals import DamagedError, seal
from medalign_jax.models.layers.lora import LoraConfig
from medalign_jax.weights.lazy import WeightError
from medalign_jax.weights.load import export, load, save
from medalign_jax.weights.table import (
    LINEAR,
    Chain,
    Ignore,
    PadAxis,
    Rule,
    Table,
    Transform,
    chain,
)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_TOP = "base_model.model."
_WEIGHT = ".weight"
_SIDES = {"a": "lora_A", "b": "lora_B"}
_BASE_COPY = Ignore(f"{_TOP}*.base_layer.weight", "the base's own, which PEFT adds for heads")

# Settings of PEFT's LoraConfig that change what an adapter computes, and the only value of each
# that is supported; absent means this value.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    # Where training began, but for the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), which take a
    # part out of the base model's own weights: an adapter of theirs fits no published base.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}
_HINTS = {
    "init_lora_weights": "it changed the base model's weights; let PEFT make a plain adapter of it "
    "(save_pretrained with path_initial_model_for_weight_conversion)",
}
# Settings that say what was adapted, or how it was trained, saved or run.
_NO_MATTER = frozenset(
    {
        *("peft_type", "r", "lora_alpha"),  # looked at by themselves
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "ensure_weight_tying", "runtime_config"),
        *("megatron_config", "megatron_core", "qalora_group_size"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of the beginnings
    }
)


def peft_table(table: Table) -> Table:
    """The mapping table of the base model's LoRA tree (``models.layers.lora``) in PEFT's names.

    A linear layer's line becomes two, for A and B; other parameters have no adapter.
    """
    rules = [line for rule in table.rules for line in _adapter_lines(rule)]
    return Table(f"{table.name} (LoRA)", tuple(rules), (_BASE_COPY,), table.prefixes)


def _adapter_lines(rule: Rule) -> list[Rule]:
    steps = rule.transform.steps if isinstance(rule.transform, Chain) else (rule.transform,)
    first, *pads = steps
    matrix = first == LINEAR and all(isinstance(step, PadAxis) for step in pads)
    if not matrix or not all(name.endswith(_WEIGHT) for name in rule.names):
        return []
    lines = []
    for axis, (side, name) in enumerate(_SIDES.items()):
        # Axis 0 of a kernel is axis 0 of A, axis 1 that of B.
        own: list[Transform] = [step for step in pads if step.axis == axis]
        upstream = tuple(_adapter_name(each, name) for each in rule.names)
        lines.append(Rule(upstream, f"{rule.path}/{side}", chain(LINEAR, *own), rule.layers))
    return lines


def _adapter_name(weight: str, side: str) -> str:
    return f"{_TOP}{weight.removesuffix(_WEIGHT)}.{side}{_WEIGHT}"


def export_peft(
    folder: str | os.PathLike[str],
    lora: Any,
    table: Table,
    config: LoraConfig,
    base_name: str,
    names: Iterable[str] | None = None,
) -> list[str]:
    """Writes an adapter in PEFT's layout.

    With arrays spread over several processes all of them must call this.

    Args:
      folder: made if need be.
      lora: the adapter's tree.
      table: the base model's mapping table.
      config: the adapter's.
      base_name: the base model, as a Hub id or a path, that the adapter's config names.
      names: tensor names of the model that the adapter will be put on (the keys of its
        ``state_dict``), which decide between the table's prefixes and alternatives. None: the
        first of each.

    Returns:
      The adapted modules' upstream names, sorted: PEFT's ``target_modules``. They are written in
      full, so that no module of the same name elsewhere in the model (an audio tower's ``q_proj``)
      is adapted too.

    Raises:
      WeightError: an adapted kernel that is not a linear layer of the table.
    """
    sided = None
    if names is not None:
        weights = [name for name in names if name.endswith(_WEIGHT)]
        sided = [_adapter_name(name, side) for name in weights for side in _SIDES.values()]
    tensors = export(lora, peft_table(table), names=sided)
    ending = f".{_SIDES['a']}{_WEIGHT}"
    modules = sorted(
        name.removeprefix(_TOP).removesuffix(ending) for name in tensors if name.endswith(ending)
    )
    if jax.process_index() == 0:  # one writer
        save(Path(folder) / WEIGHTS_FILE, tensors)
        text = json.dumps(_config(config, base_name, modules), indent=2, sort_keys=True)
        write_whole(Path(folder) / CONFIG_FILE, f"{text}\n".encode())
        seal(Path(folder))
    return modules


def _config(config: LoraConfig, base_name: str, modules: list[str]) -> dict[str, Any]:
    alpha = float(config.alpha)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # readers expect a whole one
        "lora_dropout": 0.0,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "inference_mode": True,
    }


def import_peft(
    folder: str | os.PathLike[str], abstract: Any, table: Table, config: LoraConfig
) -> Any:
    """Reads an adapter in PEFT's layout.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      abstract: shapes of the adapter's tree, with shardings or without, as
        ``jax.eval_shape(lambda: init_lora(key, params, config))`` gives them.
      table: the base model's mapping table.
      config: has to have the file's rank and alpha.

    Returns:
      The adapter's tree, float32.

    Raises:
      WeightError: everything that does not fit, in one error: settings that are not supported or
        differ from ``config``, tensors that are missing, unused or of a wrong shape.
    """
    folder = Path(folder)
    problems = _config_problems(folder / CONFIG_FILE, config)
    try:
        lora = load(folder / WEIGHTS_FILE, peft_table(table), abstract, dtype=np.float32)
    except (WeightError, DamagedError) as error:
        problems.append(str(error))
    if problems:
        raise WeightError(f"{folder}: not the adapter expected:\n" + "\n".join(problems))
    return lora


def _config_problems(path: Path, config: LoraConfig) -> list[str]:
    """What of a file's settings is not as asked for or not supported."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror or error})"]
    except ValueError as error:
        return [f"{path}: not JSON ({error})"]
    if not isinstance(found, dict):
        return [f"{path}: not a JSON object"]
    expected = {"peft_type": ("LORA",), "r": (config.rank,), "lora_alpha": (config.alpha,)}
    problems = [
        f"{path}: {name} is {found.get(name)!r}, expected {values[0]!r}"
        for name, values in expected.items()
        if found.get(name) not in values
    ]
    problems += [
        f"{path}: {name} is {found[name]!r}; "
        + _HINTS.get(name, f"only {values[0]!r} is supported")
        for name, values in _PLAIN.items()
        if name in found and found[name] not in values
    ]
    problems += [
        f"{path}: {name} is {value!r:.200}; this setting is not known, so what it computes is not"
        for name, value in found.items()
        if name not in _PLAIN and name not in _NO_MATTER and value not in (None, False, {}, [])
    ]
    return problems
