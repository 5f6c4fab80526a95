"""Writes docs/api.md from the docstrings of the public modules, without importing the package.

python docs/write_api.py
"""

import ast
import pathlib
import textwrap

FOLDER = pathlib.Path(__file__).parent
PACKAGE = FOLDER.parent / "vqrae_jax"
PUBLIC = (
    "inference/tokenizer", "inference/editing", "data/codes", "data/code_shards", "build/tokenizer", "config",
    "config/schema", "config/recipes", "models/vqrae", "models/encoder", "models/decoder", "models/generator",
    "generation/*", "quantizers/*", "evaluation/evaluator", "checkpoint", "sharding", "storage", "errors",
)  # fmt: skip
HEAD = "# API\n\nWritten by `python docs/write_api.py` from the docstrings. [design.md](design.md) names the axes.\n"


def find_modules() -> list[pathlib.Path]:
    """Returns the files of the public modules."""
    paths = []
    for name in PUBLIC:
        single = PACKAGE / name / "__init__.py"
        paths += [single] if single.is_file() else sorted(PACKAGE.glob(f"{name}.py"))
    return [path for path in paths if path.name != "__init__.py" or path.stat().st_size]


def public_names() -> set[str]:
    """Returns the names of the classes and functions that the document describes."""
    return {node.name for path in find_modules() for node in _definitions(ast.parse(path.read_text(encoding="utf-8")))}


def build_document() -> str:
    """Returns the text of the document."""
    return HEAD + "".join(_describe_module(path) for path in find_modules())


def _definitions(tree: ast.Module) -> list[ast.ClassDef | ast.FunctionDef]:
    named = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return [node for node in named if not node.name.startswith("_") and node.name != "main"]


def _describe_module(path: pathlib.Path) -> str:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    parts = [f"\n## {name}\n\n{(ast.get_docstring(tree) or '').strip()}\n"]
    for node in _definitions(tree):
        if isinstance(node, ast.ClassDef):
            parts.append(_describe_class(node, source))
        else:
            parts.append(f"\n### {node.name}\n\n{_signature(node)}\n{_docstring(node)}")
    return "".join(parts)


def _describe_class(node: ast.ClassDef, source: str) -> str:
    """Describes a class: its docstring, the fields of a config section or dataclass, and its documented methods."""
    text = f"\n### {node.name}\n\n{_docstring(node)}"
    fields = [child for child in node.body if isinstance(child, ast.AnnAssign)]
    declared = "Section" in map(ast.unparse, node.bases) or "dataclass" in "".join(
        map(ast.unparse, node.decorator_list)
    )
    if fields and declared:
        text += _fields(fields, source.splitlines())
    for method in node.body:
        if not isinstance(method, ast.FunctionDef) or (method.name.startswith("_") and method.name != "__init__"):
            continue
        if method.name == "__init__" or (method.name != "setup" and ast.get_docstring(method)):
            kind = "property " if any("property" in ast.unparse(d) for d in method.decorator_list) else ""
            text += f"\n#### {kind}{node.name}.{method.name}\n\n{_signature(method)}\n{_docstring(method)}"
    return text


def _fields(fields: list[ast.AnnAssign], lines: list[str]) -> str:
    """Returns the source of the fields with their comments."""
    first, last = fields[0].lineno, fields[-1].end_lineno
    while lines[first - 2].lstrip().startswith("#"):
        first -= 1
    return f"\n```python\n{textwrap.dedent(chr(10).join(lines[first - 1 : last]))}\n```\n"


def _signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({ast.unparse(node.args)}){returns}"
    return f"```python\n{textwrap.fill(line, 110, subsequent_indent='    ')}\n```\n"


def _docstring(node: ast.AST) -> str:
    """Returns the first paragraph as text and the rest, whose lists depend on indentation, as a literal block."""
    summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
    if summary.startswith(("Args:", "Attributes:")):
        summary, rest = "", f"{summary}\n\n{rest}".strip()
    return "\n".join([*([f"{summary}\n"] if summary else []), *([f"```text\n{rest}\n```\n"] if rest else [])])


if __name__ == "__main__":
    (FOLDER / "api.md").write_text(build_document(), encoding="utf-8")
