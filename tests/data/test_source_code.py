import ast
from textwrap import dedent

import pytest

from tritter.data.built_in import _documented_nodes, _strip_documentation


def stripped(source: str) -> str:
    source = dedent(source)
    return _strip_documentation(source, tree=ast.parse(source))


def test_docstrings_and_comments_go_and_the_layout_stays():
    source = '''\
        #!/usr/bin/env python
        """Module — with é.

        More."""

        import os  # why

        class A:
            """Of class A."""

            x = 1

            def f(self,
                  y):   # trailing
                "Of f."
                # a line of its own
                return [y,  # first
                        2]
        '''
    assert stripped(source) == dedent("""\
        import os

        class A:

            x = 1

            def f(self,
                  y):
                return [y,
                        2]
        """)


def test_a_number_sign_in_a_string_is_no_comment():
    source = """\
        a = "# no" + '# no \\' # no' + "\\\\" # yes
        b = '''
        # no "
        ''' + f"{a!r:#>10}"
        """
    assert stripped(source) == dedent(source).replace(" # yes", "")


@pytest.mark.parametrize(
    "source, expected",
    [
        ('def f():\n    "doc"\n', "def f():\n    pass\n"),
        ('class A: "doc"\n', "class A: pass\n"),
        ('"é" "ü"\nx = 1\n', "x = 1\n"),
        ('"only"\n', ""),
        ("# only\n", ""),
        ('x = 1\n"not a docstring"\n', 'x = 1\n"not a docstring"\n'),
        ('x = "a\fb"\ndef f():\n    "doc"\n    return 1\n', 'x = "a\fb"\ndef f():\n    return 1\n'),
        ('def f(x="é"): "doc ü"; return x  # é\n', 'def f(x="é"): pass; return x\n'),
    ],
)
def test_corners(source, expected):
    assert stripped(source) == expected


def test_definitions_are_found_in_every_kind_of_block():
    source = dedent("""\
        if a:
            def one(): "1"
        else:
            def two(): "2"
        try:
            def three(): "3"
        except E:
            def four(): "4"
        finally:
            with a:
                async def five(): "5"
        match a:
            case 1:
                class Six: "6"
        """)
    found = list(_documented_nodes(ast.parse(source)))
    assert [ast.get_docstring(node) for node in found] == list("123456")
