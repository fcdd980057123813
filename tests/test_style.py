"""House rules that a tool can hold: sizes, and constructs that are never used in the library."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "vlp").rglob("*.py"), *(ROOT / "data_recipes").rglob("*.py")]) + [
    path for path in ROOT.glob("*.py")
]
MAX_FILE, MAX_FUNCTION, MAX_ENTRY, MAX_STEP, MAX_PARAMETERS, MAX_EXPERIMENT = 600, 80, 60, 20, 8, 40

BANNED_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
BANNED_CALLS |= {"yaml.full_load", "torch.hub.load", "numpy.load", "np.load", "tarfile.open", "TarFile.extractall"}
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib", "ftplib"}
ERROR_OF_TORCH = "pickle.UnpicklingError"  # what torch.load raises under weights_only=True; the rest is banned
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def dotted(node: ast.AST) -> str:
    """Return "a.b.c" of a name or attribute, "" of anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}".lstrip(".")
    return node.id if isinstance(node, ast.Name) else ""


def keywords(call: ast.Call) -> dict[str | None, object]:
    return {each.arg: getattr(each.value, "value", ...) for each in call.keywords}


def call_errors(call: ast.Call) -> Iterator[str]:
    name, given = dotted(call.func), keywords(call)
    if name in BANNED_CALLS:
        yield f"calls {name}"
    if given.get("shell", False) is not False:
        yield "starts a shell"
    if name == "torch.load" and given.get("weights_only") is not True:
        yield "torch.load without weights_only=True"
    if given.get("trust_remote_code", False) is not False:
        yield "trusts remote code"
    if given.get("allow_pickle", False) is not False:
        yield "allows pickle"


def handler_errors(handler: ast.ExceptHandler) -> Iterator[str]:
    last = handler.body[-1]
    passes_on = isinstance(last, ast.Raise) and last.exc is None
    if handler.type is None or (dotted(handler.type) == "BaseException" and not passes_on):
        yield "catches everything"
    if all(isinstance(each, ast.Pass) for each in handler.body):
        yield "swallows an error"


def errors(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and finding for every banned construct."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from ((node.lineno, text) for text in call_errors(node))
        elif isinstance(node, ast.ExceptHandler):
            yield from ((node.lineno, text) for text in handler_errors(node))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in BANNED_MODULES:
            yield node.lineno, f"imports from {node.module}"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.asname or alias.name != ERROR_OF_TORCH.split(".")[0]]
            yield from ((node.lineno, f"imports {n}") for n in names if n.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.Attribute) and dotted(node).startswith("pickle.") and dotted(node) != ERROR_OF_TORCH:
            yield node.lineno, f"uses {dotted(node)}"


def length(node: ast.AST, *, docstring: bool) -> int:
    """Lines of a function; without its docstring if that does not count."""
    assert isinstance(node, FUNCTIONS) and node.end_lineno is not None
    lines, first = node.end_lineno - node.lineno + 1, node.body[0]
    if not docstring and ast.get_docstring(node) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, FUNCTIONS))


def each(path: Path, found: Iterator[tuple[int, str]]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{line} {text}" for line, text in found]


def test_nothing_banned_is_used():
    wrong = [text for path in FILES for text in each(path, errors(ast.parse(path.read_text("utf-8"))))]
    assert not wrong, "\n".join(wrong)


def test_files_stay_below_their_limit():
    limits = {path: MAX_ENTRY if path.parent == ROOT else MAX_FILE for path in FILES}
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    wrong = [f"{path.relative_to(ROOT)} has {size} lines" for path, size in sizes.items() if size > limits[path]]
    assert not wrong, "\n".join(wrong)


def test_functions_stay_below_their_limit():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length(node, docstring=True)} lines"
        for path in FILES
        for node in functions(path)
        if length(node, docstring=True) > MAX_FUNCTION
    ]
    assert not wrong, "\n".join(wrong)


def test_the_median_function_is_short():
    lengths = sorted(length(node, docstring=True) for path in FILES for node in functions(path))
    assert lengths[len(lengths) // 2] <= 15


def test_functions_take_few_parameters_and_one_of_them_by_position_where_they_are_many():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} takes {len(names)} parameters by position"
        for path in FILES
        for node in functions(path)
        if len(names := [a.arg for a in node.args.args if a.arg not in ("self", "cls")]) > MAX_PARAMETERS
    ]
    assert not wrong, "\n".join(wrong)


def test_the_training_step_can_be_read_at_a_glance():
    (step,) = (node for node in functions(ROOT / "vlp/training/module.py") if node.name == "training_step")
    assert length(step, docstring=False) <= MAX_STEP


def test_packages_export_nothing_from_inside():
    for path in (ROOT / "vlp").rglob("__init__.py"):
        tree = ast.parse(path.read_text("utf-8"))
        modules = [node.module or "vlp" for node in tree.body if isinstance(node, ast.ImportFrom)]
        inner = [module for module in modules if module.split(".")[0] == "vlp"]
        assert not inner and path.parent == ROOT / "vlp", f"{path}: `_target_` names the file that defines a class"


def test_experiments_are_short():
    paths = sorted((ROOT / "conf/experiment").rglob("*.yaml"))
    assert all(len(path.read_text("utf-8").splitlines()) <= MAX_EXPERIMENT for path in paths)


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec('1')",
        "yaml.load(file)",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import pickle\npickle.loads(data)",
        "import pickle as p",
        "import dill",
        "from pickle import loads",
        "try:\n    f()\nexcept:\n    g()",
        "try:\n    f()\nexcept BaseException:\n    g()",
        "try:\n    f()\nexcept OSError:\n    pass",
    ],
)
def test_banned_constructs_are_seen(source):
    assert len(list(errors(ast.parse(source)))) >= 1


@pytest.mark.parametrize(
    "source",
    [
        "yaml.safe_load(file)",
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "subprocess.run(['ls'], shell=False)",
        "try:\n    f()\nexcept BaseException:\n    g()\n    raise",
        "import pickle\ntry:\n    f()\nexcept pickle.UnpicklingError:\n    g()",
    ],
)
def test_their_safe_forms_are_not(source):
    assert not list(errors(ast.parse(source)))


def test_length_leaves_the_docstring_out():
    node = ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x').body[0]
    assert (length(node, docstring=True), length(node, docstring=False)) == (7, 3)
