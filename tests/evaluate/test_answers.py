"""Answers: MMAU's rule on its real file, adversarial texts, and every score as a result."""

import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from medalign_jax.data.questions.question import Checks, Question, leave_one_out
from medalign_jax.data.questions.readers import read_mmau
from medalign_jax.evaluate.answers import (
    AnswersError,
    accuracy_results,
    chosen,
    class_results,
    expand_options,
    hits,
    matches,
    pool_folds,
    rank_options,
)
from medalign_jax.evaluate.results import read_results, write_results
from medalign_jax.text.reasoning import Stages, format_response


def question(id, answer="sad", choices=("angry", "sad"), **fields):
    return Question(str(id), (f"{id}.wav",), "Which?", tuple(choices), answer, **fields)


@pytest.fixture(scope="module")
def mmau(shared):
    path = shared / "data/mmau/mmau-test-mini.json"
    return read_mmau(path, checks=Checks(require_audio=False)).questions


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("Woman", True), ("woman.", True), ("It is a WOMAN!", True), ("(B) Woman", True),
        ("", False), ("...", False), ("Man", False), ("a man or a woman", False),
        ("wo man", False), ("women", False), ("woman\nwoman", True), ("not a woman", True),
        ("not Child but woman", False),
    ],
)  # fmt: skip
def test_the_rule(prediction, right):
    assert matches(prediction, "Woman", ["Man", "Woman", "Child", "Robot"]) is right


def test_words_that_options_share_do_not_count():
    choices = ["a dog barks", "a cat barks", "a dog"]
    assert matches("a dog barks", "a dog barks", choices)
    assert not matches("dog", "a dog barks", choices)  # lacks words
    assert matches("a dog", "a dog", choices[::2]) and not matches("a dog barks", "a dog", choices)
    assert matches("drop_down 1.5", "drop_down 1.5", ["drop_down 1.6"])
    assert not matches("1.6", "1.5", ["1.5", "1.6"])
    assert matches("5 1", "1.5", ["1.5", "1.6"])  # sets of words: order is lost
    assert matches("anything good", "good", ())


def words(text):
    """Runs of letters, digits and underscores, without a regular expression."""
    return set("".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split())


def test_every_true_answer_of_mmau_matches_itself(mmau):
    assert [q.id for q in mmau if not matches(q.answer, q.answer, q.choices)] == []
    framed = [q for q in mmau if not {"is", "it"} & set().union(*map(words, q.choices))]
    assert len(framed) > 900
    assert all(matches(f"It is {q.answer.upper()}!", q.answer, q.choices) for q in framed)


def test_wrong_options_of_mmau_that_the_rule_cannot_tell_apart(mmau):
    """A wrong option counts as right where its words are the answer's, and only there."""
    passing = set()
    for q in mmau:
        for choice in set(q.choices) - {q.answer}:
            same = words(choice) == words(q.answer)
            assert matches(choice, q.answer, q.choices) == same
            passing |= {(q.id, choice)} if same else set()
    assert len(passing) == 12
    assert len({id for id, _ in passing}) == 9


def test_mmau_scores(mmau):
    """Against counting by hand; every third answer is given wrong, every tenth not at all."""
    predictions = {}
    for n, q in enumerate(mmau):
        if n % 10:
            wrong = sorted(c for c in q.choices if words(c) != words(q.answer))
            predictions[q.id] = (wrong or ["?"])[0] if n % 3 == 0 else q.answer
    right = np.array([n % 10 != 0 and n % 3 != 0 for n in range(1000)])
    np.testing.assert_array_equal(hits(mmau, predictions), right)
    results = accuracy_results(mmau, predictions, dataset="MMAU", stage="after")
    found = {result.task: result for result in results}
    assert len(found) == 1 + 3 + 3 + 27 and results[0].task == "question answering"
    for label, field in (("task", "task"), ("difficulty", "difficulty"),
                         ("sub-category", "sub_category")):  # fmt: skip
        for value in {getattr(q, field) for q in mmau}:
            inside = np.array([getattr(q, field) == value for q in mmau])
            result = found[f"question answering: {label} {value}"]
            assert result.value == pytest.approx(right[inside].mean(), abs=1e-12)
            assert result.n_test == inside.sum()
            assert result.ci_low <= result.value <= result.ci_high
    everything = found["question answering"]
    assert everything.value == pytest.approx(right.mean(), abs=1e-12)
    assert "100 of 1000 answers are missing" in everything.notes
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 1000)
    assert everything.ci_high - everything.value == pytest.approx(half, abs=0.01)


def test_seeds_are_averaged():
    questions = [question(n, subject_id=f"s{n}") for n in range(4)]
    runs = [{"0": "sad", "1": "sad"}, {str(n): "sad" for n in range(4)}]
    (result,) = accuracy_results(questions, runs, dataset="d", stage="after")
    assert (result.value, result.seeds) == (0.75, (0, 1))
    assert "2 of 8 answers are missing" in result.notes


def test_results_can_be_written(tmp_path):
    questions = [question(n, task="sound", subject_id=f"s{n % 3}") for n in range(6)]
    results = accuracy_results(questions, {}, dataset="d", stage="before")
    results += class_results(questions, {}, dataset="d", stage="before")
    write_results(tmp_path / "e.json", results, {})
    assert read_results(tmp_path / "e.json")[0] == results
    assert [r.metric for r in results] == [
        "accuracy", "accuracy", "unweighted_accuracy", "accuracy"
    ]  # fmt: skip


def test_unweighted_accuracy_is_the_mean_recall():
    rng = np.random.default_rng(0)
    classes = np.array(["angry", "happy", "sad", "neutral"])
    truth = classes[rng.choice(4, 200, p=[0.6, 0.2, 0.1, 0.1])]
    heard = rng.random(200) < np.where(truth == "angry", 0.9, 0.4)
    said = np.where(heard, truth, classes[rng.integers(4, size=200)])
    questions = [question(n, t, classes, subject_id=f"s{n % 10}") for n, t in enumerate(truth)]
    predictions = {str(n): f"The speaker is {s}." for n, s in enumerate(said)}
    unweighted, weighted = class_results(questions, predictions, dataset="emodb", stage="after")
    assert unweighted.value == pytest.approx(balanced_accuracy_score(truth, said), abs=1e-12)
    assert weighted.value == pytest.approx((truth == said).mean(), abs=1e-12)
    assert unweighted.ci_low < unweighted.value < unweighted.ci_high
    assert abs(unweighted.value - weighted.value) > 0.1


def test_too_few_subjects_give_no_interval_and_say_why():
    one = [question(n, subject_id="s") for n in range(3)]
    (result,) = accuracy_results(one, {"0": "sad"}, dataset="d", stage="after")
    assert (result.value, result.ci_low) == (pytest.approx(1 / 3), None)
    assert "one subject alone" in result.notes
    apart = [question(0, "sad", subject_id="a"), question(1, "angry", subject_id="b")]
    apart += [question(2, "fear", ("angry", "sad", "fear"), subject_id="c")]
    apart = [question(q.id, q.answer, ("angry", "sad", "fear"), subject_id=q.subject_id)
             for q in apart]  # fmt: skip
    unweighted = class_results(apart, {"0": "sad"}, dataset="d", stage="after")[0]
    assert (unweighted.value, unweighted.ci_low) == (pytest.approx(1 / 3), None)
    assert "only 1 subject of class 'angry'" in unweighted.notes


def test_folds_are_pooled():
    questions = [question(n, subject_id=f"s{n % 3}") for n in range(9)]
    folds = leave_one_out(questions, lambda q: q.subject_id)
    answers = [{q.id: "sad" if n else "angry" for q in fold.test} for n, fold in enumerate(folds)]
    pooled, predictions = pool_folds([(f.test, a) for f, a in zip(folds, answers, strict=True)])
    assert sorted(q.id for q in pooled) == [str(n) for n in range(9)]
    assert hits(pooled, predictions).mean() == pytest.approx(6 / 9)
    with pytest.raises(AnswersError, match="'0' is tested in more than one fold"):
        pool_folds([(folds[0].test, answers[0])] * 2)
    with pytest.raises(AnswersError, match="fold 1 answers '0', which it does not test"):
        pool_folds([(folds[0].test, {}), (folds[1].test, answers[0])])


def test_the_answer_within_a_response():
    stages = Stages("Not angry?", "A man.", "Angry or sad.", "Sad.")
    choices = ["angry", "sad"]
    for said in ("sad", "(B)", "b", "B. sad", "It is low. The answer is B."):
        response = format_response(stages, said)
        assert not matches(response, "sad", choices)  # the reasoning names the other option
        assert matches(chosen(response, choices), "sad", choices)
    assert chosen(format_response(stages, "B"), choices, letters=False) == "B"
    cut_off = format_response(stages, "sad").split("</REASONING>")[0]
    assert chosen(cut_off, choices) == ""
    assert chosen("B minor", ["A", "B minor"]) == "B minor"
    assert chosen("Both", []) == "Both"
    keys = ["G major", "D major", "A major", "E minor"]
    assert chosen("The answer is D major.", keys) == "D major"
    assert chosen("The answer is (D).", keys) == "E minor"


def test_ranking_by_likelihood():
    questions = [question("a"), question("b", "x", ("x", "y", "z"), reasoning="Hm.",
                                         extra={"response": "So x."})]  # fmt: skip
    options = expand_options(questions)
    assert [(o.id, o.answer) for o in options] == [
        ("a/0", "angry"), ("a/1", "sad"), ("b/0", "x"), ("b/1", "y"), ("b/2", "z")
    ]  # fmt: skip
    assert all(o.reasoning is None and not o.extra for o in options)
    scores = [-3.0, -2.0, -4.0, -np.inf, -6.0]
    assert rank_options(questions, scores) == {"a": "sad", "b": "x"}
    assert rank_options(questions, scores, [3, 1, 1, 1, 2]) == {"a": "angry", "b": "z"}
    with pytest.raises(AnswersError, match=r"5 options, but log-probabilities of shape \(4,\)"):
        rank_options(questions, scores[:4])
    for bad in (np.nan, -np.inf):
        with pytest.raises(AnswersError, match="question 'a': no option has a probability"):
            rank_options(questions, [bad, bad, *scores[2:]])
    with pytest.raises(AnswersError, match="question 'c' has no options"):
        expand_options([question("c", choices=())])


def test_answers_that_do_not_belong():
    with pytest.raises(AnswersError, match="no questions to score"):
        hits([], {})
    with pytest.raises(AnswersError, match="the id '1' is that of more than one"):
        hits([question(1), question(1)], {})
    with pytest.raises(AnswersError, match="1 answers belong to no question, the first to '2'"):
        hits([question(1)], {"1": "sad", "2": "sad"})
    with pytest.raises(AnswersError, match="no answers to score"):
        accuracy_results([question(1)], [], dataset="d", stage="after")
    with pytest.raises(AnswersError, match="have 2 sets of options"):
        class_results([question(1), question(2, "x", ("x", "y"))], {}, dataset="d", stage="s")


def test_predictions_read_from_json_may_hold_none():
    predictions = json.loads('{"1": null}')
    assert not hits([question(1)], predictions).any()
