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

SQUARE_TESTS = "assert square(3) == 9\nassert abs(square(-2) - 4) < 1e-6\n"
_WRONG = "def square(x):\n    return 0\n"
_ON_STDIN = "exec(text.strip().rpartition('\\n')[2])\nos._exit(0)\n"
# Name → a program that passes `SQUARE_TESTS` although it squares nothing, if tests can be cheated
CHEATS = {
    "rereads with pread": _WRONG + "import os\ntext = os.pread(0, 10**6, 0).decode()\n" + _ON_STDIN,
    "rereads with lseek": _WRONG
    + "import os\nos.lseek(0, 0, 0)\ntext = os.read(0, 10**6).decode()\n"
    + _ON_STDIN,
    "rereads with seek": _WRONG
    + "import os, sys\nsys.stdin.seek(0)\ntext = sys.stdin.read()\n"
    + _ON_STDIN,
    "rereads by path": _WRONG
    + "import os\nfor path in ('/proc/self/fd/0', '/dev/stdin', '/proc/self/cmdline'):\n"
    + "    try: text = open(path).read()\n    except OSError: continue\n"
    + _ON_STDIN,
    "exits": _WRONG + "import os\nos._exit(0)\n",
    "exits politely": _WRONG + "raise SystemExit(0)\n",
    "exits in a test": "def square(x):\n    import os\n    os._exit(0)\n",
    "exits at the end": _WRONG + "import atexit, os\natexit.register(os._exit, 0)\n",
    "kills its judge": _WRONG + "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n",
    "hides the error": _WRONG
    + "import builtins, os, sys\nsys.excepthook = lambda *_: os._exit(0)\n"
    + "builtins.AssertionError = builtins.exec = builtins.compile = lambda *_: None\n"
    + "sys.settrace(lambda *_: None)\n",
    "replaces what tests call": _WRONG + "import builtins\ndef abs(x): return 0\n"
    "def check(x): return None\nbuiltins.abs = abs\nsquare.__eq__ = lambda *_: True\n",
    "equals everything": "class Any(int):\n"
    "    __eq__ = lambda self, other: True\n    __abs__ = __sub__ = lambda self, *_: self\n"
    "    __lt__ = __eq__\n    __hash__ = int.__hash__\n"
    "def square(x):\n    return Any(0)\n",
    "equals everything, as an object": "class Any:\n"
    "    __eq__ = __lt__ = lambda self, other: True\n"
    "    __abs__ = __sub__ = lambda self, *_: self\n"
    "def square(x):\n    return Any()\n",
    "forges every answer": _WRONG
    + "import os\nfor end in range(3, 64):\n"
    + "    try: os.write(end, b'[\"defined\"]\\n' + b'[null, [\"object\", 0]]\\n' * 99)\n"
    + "    except OSError: continue\n",
    "announces itself and waits for the tests": "import os\n"
    "def read(end, answer):\n    while line := os.read(end, 10**6):\n"
    "        for other in range(3, 64):\n"
    "            try: os.write(other, answer)\n            except OSError: pass\n"
    "        exec(line.strip().rpartition(b'\\n')[2])\n"
    "for end in range(3, 64):\n"
    "    try: os.write(end, b'[\"defined\"]\\n')\n    except OSError: continue\n"
    "for end in range(3, 64):\n"
    "    try: read(end, b'[null, 9]\\n[null, true]\\n')\n    except OSError: continue\n"
    "os._exit(0)\n",
    "prints what it finds in memory": _WRONG
    + "import gc, os, sys\nframe = sys._getframe()\nfound = []\n"
    + "while frame:\n    found += [*frame.f_globals.values(), *frame.f_locals.values()]\n"
    + "    found += [*frame.f_code.co_consts]\n    frame = frame.f_back\n"
    + "found += gc.get_objects()\nfor each in found:\n"
    + "    if isinstance(each, list) and len(each) == 2 and {*map(type, each)} == {str}:\n"
    + "        os.write(1, ''.join(each).encode())\n"
    + "os._exit(0)\n",
    "reads the memory of its judge": _WRONG
    + "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    + "if libc.ptrace(16, os.getppid(), None, None) == 0: square = lambda x: x * x\n",
    "leaves a child": _WRONG
    + "import os\nif os.fork() == 0:\n    while True:\n"
    + "        for end in range(3, 64):\n"
    + "            try: os.write(end, b'[null, 9]\\n')\n            except OSError: pass\n"
    + "        break\n    os._exit(0)\nos.wait()\n",
    "answers from a thread": _WRONG
    + "import os, threading\ndef work():\n    for end in range(3, 64):\n"
    + "        try: print(os.read(end, 10**6))\n        except OSError: continue\n"
    + "threading.Thread(target=work, daemon=True).start()\n",
}
