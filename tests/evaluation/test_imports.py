"""The wing stands alone."""
from tests.fixtures.servers import ROOT


def test_the_evaluation_imports_nothing_of_the_other_wings():
    import ast
    for path in (ROOT / "evaluation").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"tasks", "scripts", "servers", "torch", "agentenv_demo"}, path
