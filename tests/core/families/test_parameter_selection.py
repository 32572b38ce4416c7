"""Selection of parameters by words, against the tensors of every family."""

import pytest

from tests.oracle.families import DENSE, SPARSE, tiny
from tritter.core.families import Model, ParameterSelection
from tritter.core.models import model_of
from tritter.errors import RequestError


@pytest.mark.quick_cases(7)
@pytest.mark.parametrize("family", [*DENSE, *SPARSE])
def test_the_parts_of_a_model_are_all_of_it_once(family: str) -> None:
    config = model_of(tiny(family)).config
    is_tied = bool(config["tie_word_embeddings"])
    words = ("embed", "norm", "attention", "ffn", "experts", "router")
    words = words if is_tied else ("head", *words)
    for tensor in Model(config).tensors:
        found = [
            word for word in words if ParameterSelection.read([word]).has(tensor, is_tied=is_tied)
        ]
        assert len(found) == 1, (tensor.name, found)


def test_words_mean_what_they_say() -> None:
    config = model_of(tiny("llama", num_hidden_layers=5, tie_word_embeddings=True)).config
    tensors = Model(config).tensors

    def names(*words: str | int) -> set[str]:
        selection = ParameterSelection.read(words)
        return {t.name for t in tensors if selection.has(t, is_tied=True)}

    layers = {n: {t.name for t in tensors if t.layer == n} for n in range(5)}
    assert (
        names("1-3") == names(1, "2", "3-3") == names("3, 1-2") == layers[1] | layers[2] | layers[3]
    )
    assert names("head") == names("embed") == {"embed"}
    assert names("norm", 4) == {"final_norm"} | layers[4]
    assert names("attention") == {t.name for t in tensors if "attention" in t.name}
    assert names("5-9") == set()
    assert ParameterSelection.read(["0-7", "embed"]).last_layer == 7
    assert ParameterSelection.read(["embed"]).last_layer == -1


@pytest.mark.parametrize("words", [[], [""], ["3-1"], ["-1"], ["1-"], ["attn"], ["1,,2"], ["1.5"]])
def test_other_words_are_refused(words: list[str]) -> None:
    with pytest.raises(RequestError, match="must be layer numbers"):
        ParameterSelection.read(words)
