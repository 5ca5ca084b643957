"""Textualisation: an audio language model describes each recording for a text-only teacher.

questions with reasoning -> prompts, sorted by length -> batches -> descriptions (`describing`)
                                                            |
              textualised.partial.jsonl, one line per record, on disk after every batch (`journal`)
                                                            |
                                    textualised.jsonl, failed.jsonl (whole, at the end)

arXiv 2509.18579, section 3.1: D_text = {(description, question, reasoning, answer)}.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_text
from medalign_jax.core.journal import Journal
from medalign_jax.data.questions.prompts import PromptFormat, SequenceBuilder
from medalign_jax.data.questions.question import Loaded, Question
from medalign_jax.data.questions.readers import write_questions
from medalign_jax.data.recordings.records import sha256
from medalign_jax.language_model import LanguageModel, load_language_model
from medalign_jax.runs.describing import (
    Plan,
    Prompting,
    Sampling,
    describe,
    plan_records,
    record_keys,
    why_unusable,
)
from medalign_jax.runs.distill.data import read_training
from medalign_jax.runs.parts.blocks import dtype_of, mesh_of, typed
from medalign_jax.runs.recordings import bind_questions
from medalign_jax.runs.workdir import (
    alone,
    begin_anew,
    bind,
    note_provenance,
    open_workdir,
    record_config,
)

OUTPUT, FAILED, PARTIAL = "textualised.jsonl", "failed.jsonl", "textualised.partial.jsonl"


@alone
def run(
    config: ConfigDict,
    workdir: Path,
    defaults: ConfigDict | None = None,
    restart: bool = False,
) -> None:
    """``--config=configs/textualize.py``."""
    prompting, sampling = _settings(config)
    workdir = open_workdir(workdir, config, defaults, restart)
    file = _digest(Path(config.data.questions))
    if not restart:
        bind(workdir, questions_file=file)
        if (workdir / OUTPUT).is_file():
            print(f"{workdir / OUTPUT} is finished; for other descriptions choose another "
                  "--workdir")  # fmt: skip
            return
    mesh = mesh_of(config)
    loaded = read_training(config.data, workdir / "unusable_rows.jsonl", decode=True)
    if restart:
        begin_anew(workdir, config)
        bind(workdir, questions_file=file)
    bind_questions(workdir, {"to describe": loaded.questions})
    model = _model(config, mesh)
    bind(workdir, shown=True, model_weights=model.identity)
    record_config(workdir, config, defaults)
    note_provenance(workdir, questions=len(loaded.questions))
    builder = _builder(config, model, prompting)
    plan = plan_records(loaded.questions, builder, prompting, sampling.max_new_tokens)
    with Journal(workdir / PARTIAL, _run_of(model, plan, sampling, config.seed)) as journal:
        if plan.data is not None:
            describe(model, plan.data, sampling, config.seed, journal, mesh)
        _finish(workdir, loaded, plan, journal, _Origin(model, builder, sampling, config.seed))


def _digest(path: Path) -> str | None:
    """SHA-256 of a file's bytes; None where it is not a file, which the reader then reports."""
    return sha256(path) if path.is_file() else None


def _settings(config: ConfigDict) -> tuple[Prompting, Sampling]:
    if not config.model.source:
        raise UserError(
            "config.model.source is empty; give an audio language model that describes the "
            "recordings, e.g. --config.model.source=Qwen/Qwen2.5-Omni-7B, or a folder"
        )
    if not config.data.questions:
        raise UserError("config.data.questions is empty; give the file of questions to textualise")
    if jax.process_count() > 1:
        raise UserError(
            "textualisation runs in one process; split the questions into files, one per process, "
            "each with a --workdir of its own"
        )
    dtype_of(config, "model")
    return (
        typed(Prompting, config.prompt, "prompt"),
        typed(Sampling, config.generate, "generate"),
    )


def _model(config: ConfigDict, mesh: Mesh) -> LanguageModel:
    print(f"loading {config.model.source}", flush=True)
    dtype = dtype_of(config, "model")
    model = load_language_model(config.model.source, mesh, dtype=dtype)
    if not model.takes_audio:
        raise UserError(
            f"config.model.source {config.model.source!r} is text-only; give an audio language "
            "model"
        )
    return model


def _builder(config: ConfigDict, model: LanguageModel, prompting: Prompting) -> SequenceBuilder:
    return SequenceBuilder(
        model.tokenizer,
        None,
        model.audio_tokens,
        min(config.data.max_length, model.text.max_positions),
        max_samples=model.max_samples,
        format=PromptFormat(system=prompting.system or None),
    )


def _run_of(model: LanguageModel, plan: Plan, sampling: Sampling, seed: int) -> str:
    """Digest of all that decides the descriptions."""
    ids, tokens = (), ""
    if plan.data is not None:
        ids, tokens = [q.id for q in plan.data.questions], plan.data.fingerprint()
    facts = [model.identity, str(model.module.dtype), ids, tokens, asdict(sampling), seed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class _Origin:
    """Where descriptions come from."""

    model: LanguageModel
    builder: SequenceBuilder
    sampling: Sampling
    seed: int

    def of(self, question: Question, text: str, record: dict[str, object]) -> dict[str, str]:
        """What `Question.extra` says of a description, written after the user's turn `text`."""
        tokenizer, system = self.model.tokenizer, self.builder.format.system
        prompt = tokenizer.prompt(text, clips=len(question.audio), system=system)
        key = jax.random.key_data(record_keys(self.seed, [question.id]))
        answer = rf"(?<!\w){re.escape(question.answer)}(?!\w)"
        named = re.search(answer, str(record["text"]), re.IGNORECASE)
        return {
            "description_model": self.model.identity,
            "description_prompt": text,
            "description_prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
            "description_seed": str(self.seed),
            "description_key": np.asarray(key).astype(">u4").tobytes().hex(),
            "description_temperature": repr(self.sampling.temperature),
            "description_top_p": repr(self.sampling.top_p),
            "description_complete": "yes" if record["ended"] else "no",
            "description_names_answer": "yes" if named else "no",
        }


def _finish(workdir: Path, loaded: Loaded, plan: Plan, journal: Journal, origin: _Origin) -> None:
    """Writes both files, in the order of the questions, and says what came out."""
    special = sorted(origin.model.tokenizer.special_tokens)
    failed: list[dict[str, object]] = [
        {"row": problem.row, "audio": problem.audio_path, "reason": problem.reason}
        for problem in loaded.problems
        if problem.fatal
    ]
    found, given = [], 0
    for question in loaded.questions:
        if question.description:
            given += 1
            found.append(question)
            continue
        reason, record = plan.failed.get(question.id, ""), journal.done.get(question.id)
        if record is not None:
            reason = why_unusable(record["text"], origin.sampling.min_words, special)
        if reason:
            failed.append({"id": question.id, "audio": question.audio, "reason": reason})
            continue
        extra = dict(question.extra) | origin.of(question, plan.texts[question.id], record)
        found.append(replace(question, description=record["text"], extra=extra))
    lines = (json.dumps(each, ensure_ascii=False) + "\n" for each in failed)
    write_text(workdir / FAILED, "".join(lines))
    if len(found) == given:
        raise UserError(
            f"no recording was described: all {len(failed)} failed, see {workdir / FAILED}"
        )
    write_questions(workdir / OUTPUT, found)
    journal.path.unlink()
    _say(workdir, found, given, len(failed))


def _say(workdir: Path, found: Sequence[Question], given: int, failed: int) -> None:
    def count(name: str, value: str) -> int:
        return sum(question.extra.get(f"description_{name}") == value for question in found)

    lines = [
        (len(found) - given, f"records described: {workdir / OUTPUT}"),
        (given, "had a description, which is kept"),
        (failed, f"failed: {workdir / FAILED}"),
        (count("complete", "no"), "are cut off at generate.max_new_tokens"),
        (count("names_answer", "yes"), "hold the words of the answer (description_names_answer)"),
    ]
    for number, what in lines:
        if number:
            print(f"{number} {what}", flush=True)
