"""python docs/write_api.py writes docs/api.md from the docstrings; nothing of the package is imported."""

import ast
import pathlib
import textwrap

HERE = pathlib.Path(__file__).parent
PACKAGE = HERE.parent / "vqrae_jax"
# What people import; everything else is inside.
MODULES = (
    "inference/tokenizer",
    "inference/editing",
    "inference/pictures",
    "data/codes",
    "data/code_shards",
    "assembly",
    "config",
    "config/schema",
    "config/recipes",
    "models/vqrae",
    "models/encoder",
    "models/decoder",
    "models/generator",
    "generation/masking",
    "generation/sampling",
    "quantizers/base",
    "quantizers/ema",
    "quantizers/simvq",
    "quantizers/fsq",
    "quantizers/lfq",
    "quantizers/gumbel",
    "quantizers/ibq",
    "quantizers/residual",
    "quantizers/product",
    "quantizers/multiscale",
    "checkpoint",
    "sharding",
    "compilation",
)
TITLE = (
    "# API\n\nWritten from the docstrings by `python docs/write_api.py`. Axes are named in the README's design notes.\n"
)


def document() -> str:
    """The page."""
    return TITLE + "".join(_module(name) for name in MODULES)


def _module(name: str) -> str:
    file = PACKAGE / f"{name}.py"
    source = (file if file.is_file() else PACKAGE / name / "__init__.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    parts = [f"\n## vqrae_jax.{name.replace('/', '.')}\n\n{_text(tree)}\n"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            parts.append(_class(node, source))
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name != "main":
            parts.append(f"\n### {node.name}\n\n{_signature(node)}\n{_block(node)}")
    return "".join(parts)


def _class(node: ast.ClassDef, source: str) -> str:
    """Docstring; of a config section the fields as they stand, of others the documented methods."""
    bases = {ast.unparse(base) for base in node.bases}
    text = f"\n### {node.name}\n\n{_block(node)}"
    if "Section" in bases:
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        if not fields:
            return text
        first, last = fields[0].lineno, fields[-1].end_lineno
        lines = source.splitlines()
        while lines[first - 2].lstrip().startswith("#"):
            first -= 1
        return f"{text}\n```python\n{textwrap.dedent(chr(10).join(lines[first - 1 : last]))}\n```\n"
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and (method.name == "__init__" or not method.name.startswith("_")):
            if method.name == "setup" or not (ast.get_docstring(method) or method.name == "__init__"):
                continue
            decorated = [ast.unparse(d) for d in method.decorator_list]
            kind = "property " if any("property" in d for d in decorated) else ""
            text += f"\n#### {kind}{node.name}.{method.name}\n\n{_signature(method)}\n{_block(method)}"
    return text


def _signature(node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({ast.unparse(node.args)}){returns}"
    return f"```python\n{textwrap.fill(line, 110, subsequent_indent='    ')}\n```\n"


def _block(node: ast.AST) -> str:
    """First paragraph as text; the rest, whose lists are laid out by indentation, as it stands."""
    text = ast.get_docstring(node)
    if not text:
        return ""
    summary, _, rest = text.partition("\n\n")
    if summary.startswith(("Args:", "Attributes:")):
        summary, rest = "", text
    parts = [f"{summary}\n"] if summary else []
    return "\n".join([*parts, f"```text\n{rest}\n```\n"] if rest else parts)


def _text(node: ast.AST) -> str:
    return (ast.get_docstring(node) or "").strip()


if __name__ == "__main__":
    (HERE / "api.md").write_text(document(), encoding="utf-8")
