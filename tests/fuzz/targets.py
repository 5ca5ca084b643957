"""The readers of files from elsewhere, each with small whole files to damage.

`SEEDS` write files; `READERS` read one to its end. What a reader may do with a damaged file is to
return values or to raise a `UserError`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from tests.fuzz import prepared


def write_seeds(folder: Path) -> dict[str, list[Path]]:
    """target -> its whole files under `folder`."""
    found = {}
    for name, write in SEEDS.items():
        place = folder / name
        place.mkdir(parents=True)
        write(place)
        whole = (p for p in place.rglob("*") if p.is_file())
        found[name] = sorted(p for p in whole if p.name not in _COMPANIONS.get(name, ()))
    return found


# ------------------------------------------------------------------------------------- weights


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "layer.weight": rng.standard_normal((4, 6), dtype=np.float32),
        "layer.bias": np.arange(6, dtype=np.float16),
        "steps": np.arange(3),
    }


def _write_safetensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(_tensors(), folder / "a.safetensors", {"format": "pt"})


def _write_torch(folder: Path) -> None:
    import torch

    state = {name: torch.from_numpy(array) for name, array in _tensors().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "zip.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)


def _write_gguf(folder: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(folder / "a.gguf", "gemma3")
    writer.add_uint32("gemma3.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_string("general.name", "small")
    rng = np.random.default_rng(0)
    blocks = gguf.quants.quantize(
        rng.standard_normal((2, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("plain", _tensors()["layer.weight"])
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, step)()
    writer.close()


def _read_weights(path: Path) -> None:
    from medalign_jax.weights.readers import open_file

    for tensor in open_file(path).values():
        tensor.read()


def _write_index(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(_tensors(), folder / "part.safetensors")
    names = dict.fromkeys(_tensors(), "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _read_index(path: Path) -> None:
    from medalign_jax.weights.readers import open_index

    for tensor in open_index(path).values():
        tensor.read()


# ------------------------------------------------------------------------------------- configs


def _write_config(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(_tensors(), folder / "model.safetensors")
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "max_position_embeddings": 512, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _read_config(path: Path) -> None:
    """As far as shapes: that is what a config decides before weights are read."""
    from medalign_jax.language_model import abstract_params, build_module
    from medalign_jax.weights.source import resolve

    if (config := resolve(path.parent).config) is not None:
        abstract_params(build_module(config))


# --------------------------------------------------------------------------------------- audio


def _write_audio(folder: Path) -> None:
    import soundfile

    sound = 0.3 * np.sin(np.arange(1600) / 5.0)
    for suffix, kind, subtype in (
        ("wav", "WAV", "PCM_16"), ("flac", "FLAC", "PCM_16"), ("ogg", "OGG", "VORBIS"),
        ("mp3", "MP3", "MPEG_LAYER_III"), ("aiff", "AIFF", "PCM_16"), ("au", "AU", "PCM_16"),
    ):  # fmt: skip
        soundfile.write(folder / f"a.{suffix}", sound, 8000, format=kind, subtype=subtype)
    soundfile.write(folder / "opus.ogg", sound, 8000, format="OGG", subtype="OPUS")
    soundfile.write(folder / "extensible.wav", np.stack([sound] * 3, 1), 8000, format="WAVEX",
                    subtype="PCM_24")  # fmt: skip


def _read_audio(path: Path) -> None:
    from medalign_jax.audio import io as audio_io

    audio_io.probe(path)
    audio_io.read(path, sample_rate=16_000, max_seconds=5.0)


# -------------------------------------------------------------------------------------- tables


def _rows() -> list[dict[str, str]]:
    return [
        {"audio_path": f"{i}.wav", "subject_id": f"s{i // 2}", "split": "train", "label": "normal",
         "murmur": "Present", "systolic_murmur_grading": "III/VI", "age": str(20 + i)}
        for i in range(6)
    ]  # fmt: skip


def _write_tables(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = _rows()
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / "a.csv").write_text("\n".join(lines))
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")


def _read_table(path: Path) -> None:
    from medalign_jax.data.recordings.manifest import read_manifest

    read_manifest(path, targets=("age",))


def _write_embeddings(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vectors = np.random.default_rng(0).standard_normal((5, 4)).tolist()
    columns = {"audio_path": list("abcde"), "label": list("ababa"), "embedding": vectors}
    pq.write_table(pa.table(columns), folder / "a.parquet")
    np.savez(folder / "a.npz", **{name: np.array(cells) for name, cells in columns.items()})


def _read_embeddings(path: Path) -> None:
    from medalign_jax.evaluate.embedding_table import read_table

    read_table(path)


def _write_results(folder: Path) -> None:
    from medalign_jax.evaluate.results import Result, write_results

    result = Result(
        task="label", dataset="x", kind="linear", stage="before", metric="auroc", value=0.8,
        ci_low=0.7, ci_high=0.9, n_train=10, n_test=10, seeds=(0,),
    )  # fmt: skip
    write_results(folder / "evaluation.json", [result], {"version": "1"})


def _read_results(path: Path) -> None:
    from medalign_jax.evaluate.results import read_results

    read_results(path)


# ----------------------------------------------------------------------------------- questions


def _write_questions(folder: Path) -> None:
    from medalign_jax.data.questions.question import Question
    from medalign_jax.data.questions.readers import write_questions

    question = Question(
        id="q1", audio=("a.wav",), question="What is heard?", choices=("a murmur", "nothing"),
        answer="a murmur", reasoning="It is long. So it is a murmur.",
    )  # fmt: skip
    write_questions(folder / "questions.jsonl", [question])


def _read_questions(path: Path) -> None:
    from medalign_jax.data.questions.question import Checks
    from medalign_jax.data.questions.readers import read_questions

    read_questions(path, Checks(require_audio=False, max_bad_fraction=1.0))


# ----------------------------------------------------------------------------------- tokenizer

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "what", "is", "heard", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE,
                "eos_token": "<|end|>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _write_word_pieces(folder: Path) -> None:
    """As BERT's: a vocabulary without tokenizer.json."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "hear", "##d"]
    (folder / "vocab.txt").write_text("\n".join(words))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def _read_word_pieces(path: Path) -> None:
    from medalign_jax.text.tokenizers import FolderTokenizer

    FolderTokenizer(path.parent).encode(["what is heard"], 16)


def _write_templates(folder: Path) -> None:
    """Each place that a processor's template may be in, in a folder of its own."""
    written = {
        "chat_template.jinja": TEMPLATE,
        "chat_template.json": json.dumps({"chat_template": TEMPLATE}),
        "processor_config.json": json.dumps({"chat_template": TEMPLATE, "processor_class": "X"}),
    }
    for name, text in written.items():
        place = folder / name.partition(".")[2] / name.partition(".")[0]
        place.mkdir(parents=True)
        _write_tokenizer(place)
        (place / name).write_text(text)


def _read_tokenizer(path: Path) -> None:
    from medalign_jax.text.chat import ChatTokenizer

    tokenizer = ChatTokenizer(path.parent)
    tokenizer.encode(["what is heard"], 16)
    tokenizer.prompt("what is heard")


def _read_broken(path: Path) -> None:
    """No reader of ours: it shows that the run finds what is wrong."""
    content = path.read_bytes()
    if len(content) % 2 and len(content) != 100:
        raise ZeroDivisionError
    if len(content) < 100:
        os.abort()


_COMPANIONS: Mapping[str, Collection[str]] = {  # of a target: lie beside, are not damaged
    "index": ("part.safetensors",),
    "config": ("model.safetensors",),
    "template": ("tokenizer.json", "tokenizer_config.json"),
}

SEEDS: Mapping[str, Callable[[Path], None]] = {
    "safetensors": _write_safetensors,
    "torch": _write_torch,
    "gguf": _write_gguf,
    "index": _write_index,
    "config": _write_config,
    "audio": _write_audio,
    "table": _write_tables,
    "embeddings": _write_embeddings,
    "results": _write_results,
    "prepared": prepared.write_prepared,
    "array_record": prepared.write_array_record,
    "questions": _write_questions,
    "tokenizer": _write_tokenizer,
    "template": _write_templates,
    "word_pieces": _write_word_pieces,
}
READERS: Mapping[str, Callable[[Path], None]] = {
    "safetensors": _read_weights,
    "torch": _read_weights,
    "gguf": _read_weights,
    "index": _read_index,
    "config": _read_config,
    "audio": _read_audio,
    "table": _read_table,
    "embeddings": _read_embeddings,
    "results": _read_results,
    "prepared": prepared.read_prepared,
    "array_record": prepared.read_array_record,
    "questions": _read_questions,
    "tokenizer": _read_tokenizer,
    "template": _read_tokenizer,
    "word_pieces": _read_word_pieces,
}
BROKEN: Mapping[str, Callable[[Path], None]] = {"_broken": _read_broken}
SHARE: Mapping[str, float] = {"tokenizer": 0.2, "config": 0.4}  # of the mutations of the others
