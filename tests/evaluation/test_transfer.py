"""The transfer matrix, by hand and by Lopez-Paz and Ranzato's formulas."""

import numpy as np
import pytest

from tritter.report.summary import Matrix, Score, TaskRecord


def scores(*losses: float | None, accuracy: float | None = None) -> dict[str, Score]:
    made = {
        name: Score(loss=2.0, loss_per_byte=loss)
        for name, loss in zip("abcd", losses, strict=False)
    }
    if accuracy is not None:
        made["a"] = Score(**made["a"].plain(), accuracy=accuracy)
    return made


def task(*domains: str, final: dict[str, Score]) -> TaskRecord:
    return TaskRecord(domains=list(domains), final=final, steps=1)


def test_repeats_are_held_against_the_first_time() -> None:
    """`a` was learned before; `b` in tasks 1 and 3, `c` in 2."""
    tasks = [
        task("b", final=scores(1.1, 0.5, 3.5, accuracy=0.2)),
        task("c", final=scores(1.3, 0.9, 1.0, accuracy=0.4)),
        task("b", final=scores(1.4, 0.4, 1.6, accuracy=0.3)),
    ]
    matrix = Matrix.of(scores(1.0, 2.0, 4.0, accuracy=0.1), tasks, learned_before=["a"])
    assert matrix.rows == ["baseline", "task 1", "task 2", "task 3"]
    assert matrix.trained == [[], ["b"], ["c"], ["b"]] and matrix.domains == ["a", "b", "c"]
    assert matrix.loss_per_byte[2] == [1.3, 0.9, 1.0] and len(matrix.loss_per_byte) == 4
    assert matrix.accuracy == {"a": [0.1, 0.2, 0.4, 0.3]}
    assert matrix.own == {"a": 0, "b": 1, "c": 2}
    assert matrix.backward_transfer == pytest.approx({"a": 0.4, "b": -0.1, "c": 0.6})
    assert matrix.forward_transfer == pytest.approx({"c": -0.5})
    assert matrix.mean_backward_transfer == pytest.approx(0.3)
    assert matrix.mean_forward_transfer == pytest.approx(-0.5)


def test_of_tasks_of_one_domain_each_it_is_the_papers() -> None:
    """BWT and FWT of section 2, with negative losses as accuracies."""
    size, generator = 4, np.random.default_rng(0)
    matrix, first = -generator.random((size, size)), -generator.random(size)
    tasks = [task("abcd"[n], final=scores(*-matrix[n])) for n in range(size)]
    found = Matrix.of(scores(*-first), tasks)
    backward = [matrix[-1, i] - matrix[i, i] for i in range(size - 1)]
    forward = [matrix[i - 1, i] - first[i] for i in range(1, size)]
    assert found.mean_backward_transfer == pytest.approx(-sum(backward) / (size - 1))
    assert found.mean_forward_transfer == pytest.approx(-sum(forward) / (size - 1))
    assert len(found.backward_transfer) == len(found.forward_transfer) == size - 1


def test_what_is_not_known_stays_unknown() -> None:
    tasks = [task("b", final=scores(1.1, 0.5)), task("a", final=scores(1.3, None))]
    matrix = Matrix.of(scores(1.0, 2.0), tasks)
    assert matrix.backward_transfer == {"b": None} and matrix.mean_backward_transfer is None
    assert matrix.forward_transfer == pytest.approx({"a": 0.1})
    alone = Matrix.of(scores(1.0, 2.0), tasks[:1])
    assert alone.backward_transfer == alone.forward_transfer == {}
    assert alone.mean_forward_transfer is None
