"""Modelfiles as Ollama reads them, and the part of Go's text/template that ours use, for comparison.

Both are interpreted here: the one after Ollama's parser, the other after its documentation.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

STRING = r'"(?:\\.|[^"\\])*"'
ACTION = re.compile(r"\{\{(-(?=\s))?((?:" + STRING + r'|[^"}]|\}(?!\}))*?)((?<=\s)-)?\}\}', re.DOTALL)
WORD = re.compile(STRING + r"|:=|[()=]|[^\s()=\"]+")


class GoTemplateError(Exception):
    """What executing a template in Go would return as an error."""


def read_modelfile(text: str) -> dict[str, list[str]]:
    """Return the arguments of each instruction.

    A value continues on the next line while its quotes are open; characters that are not printable are dropped.
    """
    found: dict[str, list[str]] = {}
    lines = iter(text.split("\n"))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        while (read := _unquoted(value.strip())) is None:
            value += "\n" + next(lines)
        printable = "".join(letter for letter in read if letter.isprintable() or letter in "\t\r\n")
        found.setdefault(name, []).append(printable)
    return found


def _unquoted(value: str) -> str | None:
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value


def answer_prompt(modelfile: str, messages: list[Any]) -> str:
    """Return the prompt that Ollama makes of a chat: its system prompt first, unless the chat brings one."""
    read = read_modelfile(modelfile)
    system = [{"role": "system", "content": text} for text in read.get("SYSTEM", [])]
    [template] = read["TEMPLATE"]
    return render(template, messages if messages[0]["role"] == "system" else [*system, *messages])


def render(template: str, messages: list[Any]) -> str:
    """Execute a template on `{"Messages": messages}`."""
    tree, rest = _block(list(_parts(template)))
    assert rest == []
    return "".join(_execute(tree, {"Messages": [{k.title(): v for k, v in m.items()} for m in messages]}, {}))


def _parts(template: str) -> Iterator[tuple[str, str]]:
    """Yield texts and actions; white space that an action trims is gone from the texts."""
    position, trims = 0, False
    for match in ACTION.finditer(template):
        text = template[position : match.start()]
        text = text.lstrip() if trims else text
        yield "text", text.rstrip() if match[1] else text
        yield "action", match[2].strip()
        position, trims = match.end(), bool(match[3])
    rest = template[position:]
    yield "text", rest.lstrip() if trims else rest


def _block(parts: list[tuple[str, str]]) -> tuple[list[Any], list[tuple[str, str]]]:
    """Return the nodes up to an `else` or `end` that is not theirs, and what follows from there on."""
    nodes: list[Any] = []
    while parts:
        (kind, content), parts = parts[0], parts[1:]
        word = content.split()[0] if kind == "action" else ""
        if word in ("else", "end"):
            return nodes, [(kind, content), *parts]
        if word == "range":
            body, parts = _block(parts)
            assert parts.pop(0) == ("action", "end")
            nodes.append(("range", content.removeprefix("range"), body))
        elif word == "if":
            node, parts = _if(content.removeprefix("if"), parts)
            nodes.append(node)
        else:
            nodes.append((kind, content))
    return nodes, parts


def _if(condition: str, parts: list[tuple[str, str]]) -> tuple[Any, list[tuple[str, str]]]:
    body, parts = _block(parts)
    _, content = parts[0]
    if content.startswith("else if"):
        otherwise, parts = _if(content.removeprefix("else if"), parts[1:])
        return ("if", condition, body, [otherwise]), parts
    if content == "else":
        nodes, parts = _block(parts[1:])
        assert parts[0] == ("action", "end")
        return ("if", condition, body, nodes), parts[1:]
    return ("if", condition, body, []), parts[1:]


def _execute(nodes: list[Any], dot: Any, variables: dict[str, str]) -> Iterator[str]:
    for node in nodes:
        match node:
            case ("text", text):
                yield text
            case ("range", what, body):
                for item in _value(what, dot, variables):
                    yield from _execute(body, item, variables)
            case ("if", condition, body, otherwise):
                yield from _execute(body if _value(condition, dot, variables) else otherwise, dot, variables)
            case ("action", content) if assignment := re.fullmatch(r"(\$\w+) :?= (.*)", content):
                variables[assignment[1]] = _value(assignment[2], dot, variables)
            case ("action", content):
                yield _value(content, dot, variables)


def _value(text: str, dot: Any, variables: dict[str, str]) -> Any:
    value, rest = _call(WORD.findall(text), dot, variables)
    assert rest == []
    return value


def _call(words: list[str], dot: Any, variables: dict[str, str]) -> tuple[Any, list[str]]:
    """Evaluate a function and its arguments, or a lone operand, up to a closing bracket."""
    name, arguments = words[0], []
    words = words[1:] if name in ("and", "eq", "slice") else words
    while words and words[0] != ")":
        word, words = words[0], words[1:]
        if word == "(":
            value, words = _call(words, dot, variables)
            words = words[1:]
        else:
            value = _operand(word, dot, variables)
        arguments.append(value)
    match name:
        case "and":
            return all(arguments), words
        case "eq":
            return arguments[0] == arguments[1], words
        case "slice":
            raise GoTemplateError("slice index out of range")
    assert len(arguments) == 1
    return arguments[0], words


def _operand(word: str, dot: Any, variables: dict[str, str]) -> Any:
    if word.startswith("."):
        return dot[word.removeprefix(".")]
    if word.startswith("$"):
        return variables[word]
    return json.loads(re.sub(r"\\U0000(?=[0-9a-f]{4})", r"\\u", word))
