import pytest

from probe.errors import UsageError, WordError
from probe.word import Encoder, tokenize
from tests import tiny


def prompt(text):
    return tokenize([Encoder(tiny.tokenizer(), tiny.TEXT)], [text])[0]


def test_words_become_tokens():
    p = prompt("a Red cat on grass and a red dog")
    assert p.tokens_of("red") == (1, 9)
    assert p.tokens_of("red#2") == (9,)
    assert p.tokens_of("RED CAT") == (1, 2)
    assert p.tokens_of("grass") == (4, 5, 6)
    assert p.words[:3] == ("a", "Red", "cat")
    assert p.word_of_token()[:7] == (0, 1, 2, 3, 4, 4, 4)
    assert p.padding == (False,) * 12
    assert prompt("a cat").padding == (False,) * 3 + (True,) * 9
    assert prompt("a cat").word_of_token() == (0, 1) + (-1,) * 10


@pytest.mark.parametrize("word", ["re", "ed", "catdog", "red#3", "", "red dog", "cat#0"])
def test_an_unknown_word_is_refused(word):
    with pytest.raises(WordError, match="Its words are: a, red, cat, and, a, red, dog|must be in its prompt"):
        prompt("a red cat and a red dog" if word != "red dog" else "a red cat").tokens_of(word)


def test_a_word_beyond_the_limit_is_refused():
    with pytest.raises(WordError, match="first 12 tokens"):
        prompt("cat " * 12 + "snow").tokens_of("snow")


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_prompt_is_refused(text):
    with pytest.raises(UsageError, match="at least one word"):
        prompt(text)


def test_an_unknown_piece_still_has_its_place():
    assert prompt("a zebra runs").tokens_of("zebra") == (1,)
