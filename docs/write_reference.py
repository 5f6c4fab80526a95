"""Writes docs/config.md and the tables of docs/quantizers.md from the config schema and the quantizers.

python docs/write_reference.py
"""

import ast
import inspect
import pathlib
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from vqrae_jax import quantizers
from vqrae_jax.config.schema import MAX_STEPS, Config, Section
from vqrae_jax.quantizers.base import Quantized, Quantizer
from vqrae_jax.quantizers.registry import QUANTIZERS, Setting, all_settings, settings_of

FOLDER = pathlib.Path(__file__).parent
COMMAND = "python docs/write_reference.py"
UNLIMITED = (10**6, MAX_STEPS, 2**63 - 1)  # upper limits that only refuse mistyped numbers
HEAD = f"""# Config fields

Every field of a config file, by section; `{COMMAND}` writes this page from
[vqrae_jax/config/schema.py](../vqrae_jax/config/schema.py). A file sets the fields that differ from the defaults, and
the command line overrides them: `--config.train.steps=1000`. Unknown fields and values out of range are errors before
anything is loaded.
"""


class Row(NamedTuple):
    """One field."""

    name: str
    values: str
    default: str
    meaning: str


def write_pages() -> dict[pathlib.Path, str]:
    """Returns the text of the pages by their path."""
    page = FOLDER / "quantizers.md"
    text = page.read_text(encoding="utf-8")
    for name, content in {"methods": _quantizer_table(), "classes": _class_reference()}.items():
        begin, end = f"<!-- {name}: written by {COMMAND} -->\n", f"<!-- end of {name} -->\n"
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return {FOLDER / "config.md": HEAD + "".join(_describe_section(Config, "")), page: text}


# --- The config ---


def _describe_section(section: type[Section], path: str, comment: str = "") -> Iterator[str]:
    """Yields the heading and the table of a section, then those of the sections in it."""
    comments, annotations = field_comments(section), typing.get_type_hints(section, include_extras=True)
    rows, inner = [], []
    for name, field in section.model_fields.items():
        kind = annotations[name]
        if isinstance(kind, type) and issubclass(kind, Section):
            inner.append((kind, f"{path}{name}.", comments.get(name, "")))
            continue
        setting = all_settings().get(f"{path}{name}".removeprefix("model."))
        meaning = _sentence(setting.doc if setting else field.description or comments[name])
        if setting:
            names = ", ".join(f"`{n}`" for n in QUANTIZERS if setting.path in _read_by(n))
            meaning += f" Quantizers: {names}."
        rows.append(Row(f"{path}{name}", describe_type(kind), repr(field.default), meaning))
    if rows:
        about = f"{inspect.cleandoc(section.__doc__)} {_sentence(comment) if comment else ''}".strip()
        yield _link_pages(f"\n## {path.rstrip('.')}\n\n{about}\n\n{format_table(rows)}")
    for arguments in inner:
        yield from _describe_section(*arguments)


def _link_pages(text: str) -> str:
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)


def _read_by(quantizer: str) -> set[str]:
    """Returns the settings that a quantizer reads, those of its wrappers included."""
    entry = QUANTIZERS[quantizer]
    wrappers = {f"quantizer_params.{name}" for name in entry.wrappers}
    return wrappers | {setting.path for setting in settings_of(entry.module).values()}


# --- The quantizers ---


def _quantizer_table() -> str:
    lines = ["| `model.quantizer` | paper | use | settings |", "| --- | --- | --- | --- |"]
    for name, entry in QUANTIZERS.items():
        paper = re.sub(r"arXiv:([\d.]+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", entry.paper)
        paper = re.sub(r"doi:(\S+)", r"[doi:\1](https://doi.org/\1)", paper)
        names = [setting.path.rpartition(".")[2] for setting in settings_of(entry.module).values()]
        settings = ", ".join(f"`{n}`" for n in names) or "-"
        lines.append(f"| `{name}` | {paper} | {entry.purpose} | {settings} |")
    return "\n".join(lines) + "\n"


def _class_reference() -> str:
    """Describes the interface, then every class that the package exports."""
    comments = field_comments(Quantized)
    fields = [f"* `{name}`: {_sentence(text)}" for name, text in comments.items()]
    methods = [
        f"* `{name}{_signature(getattr(Quantizer, name))}`: {_first_paragraph(getattr(Quantizer, name))}"
        for name in ("__call__", "lookup", "embeddings", "innermost")
    ]
    parts = [
        f"### Quantizer\n\n{_first_paragraph(Quantizer)}\n\n" + "\n".join(methods) + "\n",
        f"### Quantized\n\n{_first_paragraph(Quantized)}\n\n" + "\n".join(fields) + "\n",
    ]
    for name, value in vars(quantizers).items():
        if isinstance(value, type) and issubclass(value, Quantizer) and value is not Quantizer:
            parts.append(_describe_class(name, value))
    return "\n".join(parts)


def _describe_class(name: str, module: type[Quantizer]) -> str:
    fields = {n: p for n, p in inspect.signature(module).parameters.items() if n not in ("parent", "name")}
    arguments = [n if p.default is p.empty else f"{n}={p.default!r}" for n, p in fields.items()]
    signature = textwrap.fill(f"{name}({', '.join(arguments)})", 110, subsequent_indent="    ")
    rows = [
        Row(
            n,
            describe_type(p.annotation),
            "" if p.default is p.empty else repr(p.default),
            _documentation(p.annotation),
        )
        for n, p in fields.items()
    ]
    table = f"\n{format_table(rows)}" if rows else ""
    return f"### {name}\n\n```text\n{signature}\n```\n\n{_first_paragraph(module)}\n{table}"


def _signature(method: Any) -> str:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    return f"({', '.join(p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in parameters)})"


def _documentation(annotation: Any) -> str:
    doc = next(setting.doc for setting in annotation.__metadata__ if isinstance(setting, Setting))
    return _sentence(re.sub(r"; (None|\(\)): [^;]*", "", doc))  # values of the config only


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _first_paragraph(thing: Any) -> str:
    return " ".join(inspect.getdoc(thing).partition("\n\n")[0].split())


# --- Fields ---


def field_comments(cls: type) -> dict[str, str]:
    """Returns the comments of the fields of a class and its bases: those behind a field, or else those above it."""
    result: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if base.__module__ == cls.__module__]):
        try:
            lines = textwrap.dedent(inspect.getsource(base)).splitlines()
        except (OSError, TypeError):  # made by a function
            continue
        (tree,) = ast.parse("\n".join(lines)).body
        for node in tree.body:
            if isinstance(node, ast.AnnAssign):
                first, last = node.lineno - 1, node.end_lineno - 1
                _, _, behind = lines[last][node.end_col_offset :].partition("  # ")
                above = []
                while lines[first - 1].lstrip().startswith("# "):
                    first -= 1
                    above.insert(0, lines[first].strip()[2:])
                if behind or above:
                    result[node.target.id] = behind or " ".join(above)
    return result


def describe_type(annotation: Any) -> str:
    """Returns type and range of an annotation."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return describe_type(arguments[0]) + _describe_range(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        kind = " or ".join(describe_type(kind) for kind in arguments if kind is not type(None))
        return f"{kind}, or `None`" if "," in kind else f"{kind} or `None`"
    if origin is tuple:
        return f"tuple of {'' if arguments[-1] is ... else f'{len(arguments)} '}{describe_type(arguments[0])}"
    return (origin or annotation).__name__


def _describe_range(metadata: tuple[Any, ...]) -> str:
    limits = {}
    for entry in metadata:
        for limit in [entry, *getattr(entry, "metadata", ())]:
            limits |= {n: x for n in ("ge", "gt", "le", "lt") if (x := getattr(limit, n, None)) is not None}
    low = [f"{limits['ge']:,}"] if "ge" in limits else [f"above {limits['gt']:,}"] if "gt" in limits else []
    high = [f"{limits['le']:,}"] if limits.get("le", UNLIMITED[0]) not in UNLIMITED else []
    high = [f"below {limits['lt']:,}"] if "lt" in limits else high
    if low and high:
        return f", {low[0]} to {high[0]}"
    return f", at least {low[0]}" if low and "ge" in limits else "".join(f", {text}" for text in low)


def format_table(rows: list[Row]) -> str:
    """Returns a table in Markdown."""
    lines = ["| field | values | default | meaning |", "| --- | --- | --- | --- |"]
    for row in rows:
        default = f"`{row.default}`" if row.default else "required"
        lines.append(f"| `{row.name}` | {row.values} | {default} | {row.meaning} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path, text in write_pages().items():
        path.write_text(text, encoding="utf-8")
