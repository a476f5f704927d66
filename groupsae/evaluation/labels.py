"""Exact labels for the tokens of Python source, from its own tokenizer and parser."""

import ast
import io
import keyword
import tokenize
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool

# What a token of Python source can be, each by its first character that is no white space.
CONCEPTS = {
    "comment": "a comment",
    "string": "a string, its quotes included",
    "docstring": "the docstring of a module, class or function",
    "number": "a number",
    "keyword": "a keyword",
    "function_name": "the name of a function, where it is defined",
    "parameter": "a parameter, where its function is defined",
    "attribute": "the name after a dot",
    "called": "the name of what is called",
    "imported": "what an import statement names",
    "nested": "within two or more indented blocks",
}


def python_labels(text: str) -> dict[str, Bool[np.ndarray, " character"]] | None:
    """Return which characters of a Python file each of `CONCEPTS` covers; None if it has errors.

    >>> labels = python_labels("def area(x): return x.real  # half")
    >>> [name for name, covered in labels.items() if covered[len("def ")]]
    ['function_name']
    """
    lines = io.StringIO(text, newline="").readlines()
    starts = np.cumsum([0, *map(len, lines)])
    labels = {name: np.zeros(len(text), dtype=bool) for name in CONCEPTS}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the source: invalid escapes and the like
            tree = ast.parse(text)
        spans = [*_token_spans(lines, starts), *_tree_spans(tree, lines, starts)]
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError):
        return None
    for name, start, end in spans:
        labels[name][start:end] = True
    return labels


Span = tuple[str, int, int]  # a concept, and where it begins and ends


def _token_spans(lines: list[str], starts: np.ndarray) -> Iterator[Span]:
    depth, before = 0, ""
    for token in tokenize.generate_tokens(iter([*lines, ""]).__next__):
        start, end = (int(starts[row - 1]) + column for row, column in (token.start, token.end))
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if depth >= 2:
            yield "nested", start, end
        if token.type == tokenize.COMMENT:
            yield "comment", start, end
        elif token.type == tokenize.NUMBER:
            yield "number", start, end
        elif token.type == tokenize.NAME and keyword.iskeyword(token.string):
            yield "keyword", start, end
        elif token.type == tokenize.NAME and before == "def":
            yield "function_name", start, end
        before = token.string


def _tree_spans(tree: ast.AST, lines: list[str], starts: np.ndarray) -> Iterator[Span]:
    def place(line: int, column: int) -> int:
        text = lines[line - 1]  # columns of the parser count bytes
        return int(starts[line - 1]) + len(text.encode()[:column].decode())

    def span(name: str, node: Any, length: int | None = None) -> Span:
        """Return the span of a node, or of its last characters."""
        end = place(node.end_lineno, node.end_col_offset)
        return name, place(node.lineno, node.col_offset) if length is None else end - length, end

    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str() | bytes()) | ast.JoinedStr():
                yield span("string", node)
            case ast.arg():
                start = place(node.lineno, node.col_offset)
                yield "parameter", start, start + len(node.arg)
            case ast.Attribute():
                yield span("attribute", node, len(node.attr))
            case ast.Call(func=ast.Attribute() as named):
                yield span("called", named, len(named.attr))
            case ast.Call(func=ast.Name() as named):
                yield span("called", named)
            case ast.alias():
                yield span("imported", node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body[:1]:
                case [ast.Expr(value=ast.Constant(value=str()) as first)]:
                    yield span("docstring", first)
