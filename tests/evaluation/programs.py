"""Records of HumanEval and MBPP in their published formats, written by hand."""

HUMANEVAL_ROWS = [
    {
        "task_id": "Mine/0",
        "prompt": (
            "from typing import List\n\n\ndef largest(numbers: List[int]) -> int:\n"
            '    """Return the largest.\n    >>> largest([1, 3, 2])\n    3\n    """\n'
        ),
        "entry_point": "largest",
        "canonical_solution": "    return max(numbers)\n",
        "test": (
            "def check(candidate):\n"
            "    assert candidate([1, 3, 2]) == 3\n    assert candidate([-1]) == -1\n"
        ),
    },
    {
        "task_id": "Mine/1",
        "prompt": 'def twice(word: str) -> str:\n    """Return the word twice."""\n',
        "entry_point": "twice",
        "canonical_solution": "    both = word + word\n    return both\n",
        "test": "def check(candidate):\n    assert candidate('ab') == 'abab'\n",
    },
]
MBPP_ROWS = [
    {
        "task_id": 3,
        "text": "Write a function to add one.",
        "code": "def add_one(x):\r\n  return x + 1",
        "test_setup_code": "",
        "test_list": ["assert add_one(1) == 2", "assert add_one(0) == 1"],
        "challenge_test_list": [],
    },
    {
        "task_id": 12,
        "text": "Write a function to sort a list.",
        "code": "import heapq\r\ndef in_order(x):\r\n  return sorted(x)",
        "test_setup_code": "import math",
        "test_list": ["assert in_order([2, 1]) == [1, math.floor(2.5)]"],
        "challenge_test_list": [],
    },
    {
        "task_id": 600,
        "text": "Write a function of the training split.",
        "code": "def f():\r\n  return 1",
        "test_setup_code": "",
        "test_list": ["assert f() == 1"],
        "challenge_test_list": [],
    },
]
