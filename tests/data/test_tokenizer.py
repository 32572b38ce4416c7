from hypothesis import given
from hypothesis import strategies as st

from tritter.data.tokens import END_OF_TEXT, train_tokenizer


@given(st.text())
def test_every_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_training_is_deterministic_and_holds_its_size(documents):
    one = train_tokenizer(documents, vocab_size=300)
    again = train_tokenizer(documents, vocab_size=300)
    assert one.to_str() == again.to_str()
    assert one.get_vocab_size() == 300
    assert one.token_to_id(END_OF_TEXT) == 0
    assert one.to_str() != train_tokenizer(documents[:5], vocab_size=300).to_str()
