"""Distillation end to end: models, questions, one arm or several, answers before and after.

published weights | the demo's world -> student, teacher, questions
        |
        +-> "before": answers of the student as it is
        +-> each arm and seed: method `Distill` -> export -> answers (or one model per fold, pooled)
                                                       |
                                evaluation.json, report.html, ablations.md
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
from ml_collections import ConfigDict

from medalign_jax.core.errors import UserError
from medalign_jax.core.files import write_text
from medalign_jax.core.progress import Progress
from medalign_jax.evaluate.answering import likeliest_options, write_answers
from medalign_jax.evaluate.answers import pool_folds
from medalign_jax.language_model import LanguageModel
from medalign_jax.runs.distill import page as distill_page
from medalign_jax.runs.distill import results as scoring
from medalign_jax.runs.distill.arms import QuestionTask, Setting, fit_arm
from medalign_jax.runs.distill.data import published_setting
from medalign_jax.runs.distill.world import simulated_setting
from medalign_jax.runs.identity import digest
from medalign_jax.runs.parts.blocks import mesh_of
from medalign_jax.runs.parts.distillation import builder_of, check_settings, lora_of
from medalign_jax.runs.recordings import bind_questions, sounds_of
from medalign_jax.runs.workdir import (
    alone,
    begin_anew,
    bind,
    note_provenance,
    open_workdir,
    record_config,
)
from medalign_jax.weights.identity import params_identity
from medalign_jax.weights.peft import export_peft

Answers = dict[str, dict[str, str]]  # task -> question id -> response


@alone
def run(
    config: ConfigDict,
    workdir: Path,
    defaults: ConfigDict | None = None,
    restart: bool = False,
) -> None:
    """``--config=configs/distill.py``."""
    if not config.data.questions and "world" not in config:
        raise UserError(
            "config.data.questions is empty: name a file of training questions, or take "
            "configs/distill.py:demo, which simulates them"
        )
    arms = seeded_arms(config)
    for _, _, block in arms:
        check_settings(block)
    workdir = open_workdir(workdir, config, defaults, restart)
    mesh = mesh_of(config)
    make = published_setting if config.data.questions else simulated_setting

    def begin() -> None:
        if restart:
            begin_anew(workdir, config)

    setting = make(config, workdir, mesh, begin)
    _bind(setting)
    record_config(workdir, config, defaults)
    found: dict[str, list[Answers]] = {}
    if config.evaluate.enabled:
        found["before"] = [answers_of(setting, setting.student, workdir / "before", "before")]
    for arm, seed, block in arms:
        folder = distill_page.arm_folder(workdir, arm, seed)
        what = f"{arm} {seed}" if arm else "distil"
        if setting.folds:
            found.setdefault(arm or "after", []).append(_folds(setting, block, folder, what))
            continue
        model = _arm(setting, block, folder, what)
        if config.evaluate.enabled:
            answers = answers_of(setting, model, folder, arm or "after")
            found.setdefault(arm or "after", []).append(answers)
    if config.evaluate.enabled and jax.process_index() == 0:
        distill_page.write(setting, found)


def _bind(setting: Setting) -> None:
    """Refuses to go on with other data or weights than what is there was trained with."""
    workdir, config = setting.workdir, setting.config
    bind(
        workdir,
        shown=True,
        student_weights=setting.student.identity,
        teacher_weights=None if setting.teacher is None else setting.teacher.identity,
    )
    tests = {fold.name: fold.test for fold in setting.folds}  # of a fold the others are learnt
    bind_questions(workdir, {"train": setting.train, "valid": setting.valid, **tests})
    if not config.arms:  # else each seed has folders of its own
        bind(workdir, seed=str(config.seeds[0]))
    for arm, seed, _ in seeded_arms(config):
        if arm:
            folder = distill_page.arm_folder(workdir, arm, seed).relative_to(workdir)
            changes = json.loads(config.arms[arm].to_json_best_effort())
            bind(workdir, str(folder), **{f"arm {arm}": digest(changes)})
    note_provenance(workdir, training_questions=scoring.trained_on(setting))


def seeded_arms(config: ConfigDict) -> list[tuple[str, int, ConfigDict]]:
    """(name, seed, config) of every run; the name is "" where there is only the one."""
    found = []
    for seed in config.seeds:
        for name, changes in config.arms.items() if config.arms else [("", {})]:
            block = config.copy_and_resolve_references()
            with block.unlocked():
                block.seed = seed
                unknown = sorted(set(changes) - set(block.loss))
                if unknown:
                    raise UserError(f"config.arms.{name} changes {unknown}, which loss has not")
                block.loss.update(changes)
            found.append((name, seed, block))
    if not config.arms and len(found) > 1:
        raise UserError("config.seeds has several seeds, but config.arms is empty; name an arm")
    return found


def _arm(setting: Setting, config: ConfigDict, folder: Path, what: str) -> LanguageModel:
    """The distilled student of one arm, exported."""
    method, params = fit_arm(setting, config, folder, what)
    student, lora = setting.student, lora_of(config)
    model = student.with_params(method.student_params(params))
    if lora is not None:
        export_peft(
            folder / "export_lora", params["lora"], student.table, lora,
            base_name=str(config.student.source),
        )  # fmt: skip
    model.save(folder / "export")
    return model


def _folds(setting: Setting, config: ConfigDict, folder: Path, what: str) -> Answers:
    """Every question answered by the model of the fold that tests it; no model is exported."""
    (task,) = setting.tasks
    answered = []
    for fold in setting.folds:
        part = replace(
            setting,
            train=(*setting.train, *fold.train),
            tasks=(replace(task, questions=fold.test),),
            folds=(),
        )
        place, name = distill_page.fold_folder(folder, fold.name), f"{what}, without {fold.name}"
        method, params = fit_arm(part, config, place, name)
        model = setting.student.with_params(method.student_params(params))
        answered.append((fold.test, answers_of(part, model, place, name)[task.name]))
    return {task.name: pool_folds(answered)[1]}


def answers_of(setting: Setting, model: LanguageModel, folder: Path, what: str) -> Answers:
    """The model's responses to every task, kept in ``answers.json`` of the folder.

    ``answered.json`` beside it says by what each task was answered (weights, questions, settings):
    what is not of that is answered anew.
    """
    path, origin = folder / "answers.json", folder / "answered.json"
    kept: Answers = _object(path)
    by = _object(origin)
    weights = model.identity or params_identity(model.params)
    folder.mkdir(parents=True, exist_ok=True)
    found: Answers = {}
    for task in setting.tasks:
        asked = _asked(setting, task, weights)
        if task.name in kept and by.get(task.name) == asked:
            found[task.name] = kept[task.name]
            continue
        found[task.name] = _answer(setting, model, task, what)
        if jax.process_index() == 0:
            write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            by[task.name] = asked
            write_text(origin, json.dumps(by, indent=1) + "\n")
    return found


def _object(path: Path) -> dict:
    """A JSON file of an earlier start; {} where there is none, or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        print(f"{path} is damaged ({error}): its questions are answered anew", flush=True)
        return {}
    return found if isinstance(found, dict) else {}


def _asked(setting: Setting, task: QuestionTask, weights: str) -> str:
    """Digest of all that decides the responses to a task."""
    config = setting.config
    settings = {"how": task.how, "max_length": config.data.max_length}
    if task.how == "generate":
        settings["max_new_tokens"] = config.evaluate.max_new_tokens
    content = [[q.id, q.question, q.choices] for q in task.questions]
    return digest([weights, settings, content, sounds_of(task.questions)])


def _answer(
    setting: Setting, model: LanguageModel, task: QuestionTask, what: str
) -> dict[str, str]:
    settings = setting.config.evaluate
    builder = builder_of(setting.config, model, None)
    ranks = task.how == "rank"
    total = sum(len(q.choices) for q in task.questions) if ranks else len(task.questions)
    progress = Progress(total, f"{what}: {task.name}", "option" if ranks else "question")
    try:
        if ranks:
            return likeliest_options(
                model, task.questions, builder, settings.batch_size, mesh=setting.mesh,
                progress=progress.advance,
            )  # fmt: skip
        return write_answers(
            model, task.questions, builder, settings.max_new_tokens, settings.batch_size,
            mesh=setting.mesh, progress=progress.advance,
        )  # fmt: skip
    finally:
        progress.close()
