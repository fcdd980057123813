import pytest

from vlp.eval.answers import PROTOCOLS, Answer, accuracy, span

OPTIONS = ["a red ball", "a blue ball", "nothing", "two cats"]


@pytest.mark.parametrize(
    ("protocol", "text", "verdict"),  # the right option is B
    [
        *(("strict", text, True) for text in ("B", "b.", "(B)", "B) a blue ball", "Answer: B", "The answer is (B).")),
        *(("strict", text, True) for text in ("a blue ball", "Blue ball.")),
        *(("strict", text, False) for text in ("A", "(c)", "two cats", "A. a red ball")),
        *(("strict", text, None) for text in ("", "(", "E", "Because of B", "B. two cats", "blue", "A or B")),
        *(("mvbench_official", text, True) for text in ("B", "B.", "b)", "(b)", "(", "")),
        ("mvbench_official", "Answer: B", False),
        *(("mvbench_lmms", text, True) for text in ("B", "(B)", "B. a blue ball", "Answer: B")),
        ("mvbench_lmms", "b", False),
        ("mvbench_lmms", " ", None),
        *(("videoespresso", text, True) for text in ("B", "(B)", "The best one is B")),
        ("videoespresso", "Answer: B", False),
        ("videoespresso", "option b", None),
    ],
)
def test_protocol_reads_a_choice_as_its_toolkit_does(protocol, text, verdict):
    assert PROTOCOLS[protocol].matches(text, OPTIONS, 1) is verdict


@pytest.mark.parametrize(
    ("protocol", "text", "accepted", "verdict"),
    [
        ("open_exact", "The Dog.", ["dog"], True),
        ("open_exact", "dogs", ["dog"], False),
        ("open_exact", " ", ["dog"], None),
        ("mtvqa_official", "It costs 3.5 euros", ["3.5"], False),
        ("mtvqa_vlmevalkit", "It costs 3.5 euros", ["3.5"], True),
        ("mtvqa_official", "A BIG sign", ["big"], True),
    ],
)
def test_protocol_reads_an_open_answer_as_its_toolkit_does(protocol, text, accepted, verdict):
    assert PROTOCOLS[protocol].matches(text, accepted, 0) is verdict


def test_failures_cost_what_the_protocol_says_and_are_counted():
    answers = [Answer("A", OPTIONS, 0, "x"), Answer("A", OPTIONS, 1, "x"), Answer("?", OPTIONS, 1, "y")]
    assert accuracy(answers, PROTOCOLS["strict"]) == (100 / 3, 25.0, 3, 3, 1)
    assert accuracy(answers, PROTOCOLS["llovi"])[:3] == (100 * 1.25 / 3, 37.5, 3)
    answers[2] = answers[2]._replace(text="")
    assert accuracy(answers, PROTOCOLS["mvbench_lmms"]) == (50.0, 50.0, 2, 3, 1)
    with pytest.raises(ValueError, match="none of 1 answers can be scored under 'mvbench_lmms'"):
        accuracy(answers[2:], PROTOCOLS["mvbench_lmms"])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12.5 - 20", (12.5, 20)),
        ("It happens from 3 s to 7 seconds, and from 8 to 9", (3, 7)),
        ("00:12 to 01:05", (12, 65)),
        ("between 9 and 4", (4, 9)),
        ("at the end", None),
        ("at 7", None),
    ],
)
def test_first_time_span_of_a_text_is_read(text, seconds):
    assert span(text) == seconds
