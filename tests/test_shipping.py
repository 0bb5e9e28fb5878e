"""What is given to others: sdist, wheel, its upgrade, its symbols, and documentation that forgets no name."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import test_docstrings
import test_theory_interface
import torch

import dsc_ops
from dsc_ops import _C, functional, layers, reference, theory
from tests.shipping import audit, matrix, pythons

ROOT = Path(__file__).parents[1]
SHIPPED = ("csrc", "dsc_ops", "tests", "benchmarks", "examples", "docs")
PACKAGE = Path(dsc_ops.__file__).parent
OBJECTS = [path for name in ("_C", "_cuda") for path in PACKAGE.glob(f"{name}.*.so")]
NEEDS_NM = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("nm") or not shutil.which("readelf"), reason="needs nm and readelf"
)


# --- sdist ------------------------------------------------------------------------------------------------------------


def checkout(folder: Path) -> Path:
    """A copy of this checkout less what was made in it."""
    made = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "runs", "__pycache__", "*.so", "*.egg-info", ".*_cache", ".hypothesis"
    )
    return Path(shutil.copytree(ROOT, folder, ignore=made))


def sdist(folder: Path, out: Path, **environment: str) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"} | environment
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, check=True)
    return next(out.glob("*.tar.gz"))


def test_sdist_has_the_same_bytes_whoever_packs_it_and_when(tmp_path):
    one, other = checkout(tmp_path / "one"), checkout(tmp_path / "elsewhere" / "other")
    for path in other.rglob("*"):
        os.utime(path, (10**9, 10**9))
        path.chmod(path.stat().st_mode & 0o700)  # another umask
    first, second = sdist(one, tmp_path / "first"), sdist(other, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert {member.mtime for member in archive} == {315532800}
    files = [path for folder in SHIPPED for path in (one / folder).rglob("*") if path.is_file()]
    needed = {path.relative_to(one).as_posix() for path in [*files, one / "setup.py", one / "pyproject.toml"]}
    assert len(needed) > 200 and needed <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]
    dated = sdist(one, tmp_path / "dated", SOURCE_DATE_EPOCH="1700000000")
    with tarfile.open(dated) as archive:
        assert {member.mtime for member in archive} == {1700000000}


# --- wheel ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build():
    """setup.py as a module; it runs setup() only as a script."""
    spec = importlib.util.spec_from_file_location("dsc_ops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_free_threaded_python_is_refused_in_one_sentence(build, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: 1 if name == "Py_GIL_DISABLED" else None)
    with pytest.raises(SystemExit, match="dsc_ops: free-threaded Python is not supported yet: use .* with the GIL"):
        build.Build.run(object())


def test_what_an_earlier_build_left_does_not_get_into_the_wheel(tmp_path):
    """Build folders outlive a `git pull`."""
    source, lib = tmp_path / "source", tmp_path / "lib"
    (source / "dsc_ops").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "dsc_ops" / "__init__.py").touch()
    (lib / "dsc_ops").mkdir(parents=True)
    (lib / "dsc_ops" / "_old.py").touch()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", lib]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    assert [path.name for path in (lib / "dsc_ops").iterdir()] == ["__init__.py"]


def test_no_module_hides_behind_a_compiled_one():
    """Of _cuda.py and _cuda.so Python imports the latter, and the wheel with CUDA kernels could not be imported."""
    source = (ROOT / "setup.py").read_text()
    extensions = re.search(r"Extension\(.* for name in \((.*)\)\]", source)[1]
    names = set(re.findall(r'"(\w+)"', extensions))
    assert names == {"_C", "_cuda"} and not names & {path.stem for path in PACKAGE.glob("*.py")}


def make_wheel(folder: Path, version: str, extra: dict[str, bytes], tag: str = "py3-none-any") -> Path:
    """A wheel of the installed package, with other files besides."""
    info = f"dsc_ops-{version}.dist-info"
    files = {
        f"dsc_ops/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes()
        for path in sorted(PACKAGE.rglob("*"))
        if path.suffix in (".py", ".so", ".typed")
    }
    files |= extra | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: dsc_ops\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
    }
    rows = [f"{info}/RECORD,,"]
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(content)}")
    wheel = folder / f"dsc_ops-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in (files | {f"{info}/RECORD": "\n".join(rows).encode()}).items():
            archive.writestr(name, content)
    return wheel


def test_an_upgrade_leaves_nothing_of_the_old_version(tmp_path):
    """Both versions are used, so that they have written what they write, before and after the upgrade."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("needs pip")
    old = {"dsc_ops/_old.py": b"", "dsc_ops/_cuda.cpython-39-old.so": b"", "dsc_ops/removed/__init__.py": b""}
    wheels = [make_wheel(tmp_path, "0.0.1", old), make_wheel(tmp_path, "0.0.2", {})]
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def output(*command) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def install(wheel: Path) -> set[str]:
        """Install and use a wheel; the files of the package then."""
        options = ["--no-deps", "--force-reinstall", "--no-index"]
        output(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
        said = output(python, "-m", "dsc_ops")
        assert said.startswith("dsc_ops")
        files = [path for path in site.glob("dsc_ops*/**/*") if path.is_file() and path.suffix != ".pyc"]
        return {path.relative_to(site).as_posix() for path in files}

    assert set(old) < install(wheels[0])
    after = install(wheels[1])
    record = (site / "dsc_ops-0.0.2.dist-info" / "RECORD").read_text().splitlines()
    assert after == {row.split(",")[0] for row in record if not row.split(",")[0].endswith(".pyc")}
    assert not [path for path in site.glob("dsc_ops/**/_old.*")] and not (site / "dsc_ops" / "removed").exists()
    assert [path.name for path in site.glob("*.dist-info")] == ["dsc_ops-0.0.2.dist-info"]


# --- symbols and tag --------------------------------------------------------------------------------------------------


@NEEDS_NM
@pytest.mark.parametrize("shared", OBJECTS, ids=lambda path: path.name.partition(".")[0])
def test_objects_take_from_torch_the_stable_abi_alone(shared):
    assert audit.object_problems(shared) == []
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    paths = [*headers.glob("stable/c/*.h"), *headers.glob("inductor/aoti_torch/c/*.h")]
    declared = set(re.findall(r"\w+", "\n".join(path.read_text() for path in paths)))
    taken = audit.stable_symbols(shared)
    # One family is spelled by a macro.
    missing = {
        name for name in taken - declared if not re.match("aoti_torch_(dtype|layout|device_type|memory_format)_", name)
    }
    assert len(taken) > 30 and not missing


@NEEDS_NM
def test_objects_that_take_more_are_found(tmp_path):
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler here")
    source = tmp_path / "_C.cpp"
    source.write_text(
        'namespace c10 { int size(); } extern "C" int aoti_torch_x(); int f() { return c10::size() + aoti_torch_x(); }'
    )
    shared = tmp_path / "_C.x.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-rpath,/opt/x", source, "-o", shared], check=True)
    problems = audit.object_problems(shared)
    assert len(problems) == 2
    assert "path of the machine" in problems[0] and "takes _ZN3c104sizeEv, which is not of torch's" in problems[1]


@NEEDS_NM
def test_audit_of_a_wheel(tmp_path, capsys):
    glibc = max(audit.newest_glibc(shared) for shared in OBJECTS)
    tag = "cp3-none-manylinux_{}_{}_x86_64"
    assert audit.main([str(make_wheel(tmp_path, "0.0.1", {}, tag.format(*glibc)))]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    library = {"dsc_ops.libs/libtorch_cpu.so": b"", "dsc_ops/libcudart.so.13": b""}
    assert audit.main([str(make_wheel(tmp_path, "0.0.2", library, tag.format(2, 17)))]) == 1
    said = capsys.readouterr().out
    for name in library:
        assert f"WRONG  {name} does not belong into the wheel" in said
    assert f"needs glibc {glibc[0]}.{glibc[1]}, the tag promises 2.17" in said
    assert audit.main([str(make_wheel(tmp_path, "0.0.3", {}, "cp3-none-linux_x86_64"))]) == 1
    assert "no manylinux tag" in capsys.readouterr().out


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_matrix_counts_and_fails_when_any_torch_fails(tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert matrix.said(report) == "5 passed, 2 skipped, 2 failed"
    assert matrix.said(tmp_path / "none.xml") == "no tests ran"
    asked = []

    def try_torch(version, wheel, tree, arguments, keep):
        asked.append((version, arguments, keep))
        return matrix.Row(version, version != "2.10.0", "told", 1.0)

    monkeypatch.setattr(matrix, "try_torch", try_torch)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix.building, "make_sdist", lambda folder: folder)
    monkeypatch.setattr(matrix.building, "unpack_tests", lambda sdist, folder: folder)
    given = ["--wheel", str(report)]
    assert matrix.main([*given, "--torch", "2.10.0", "2.14.1", "--keep", "-k", "lista"]) == 1
    assert asked == [("2.10.0", ["-k", "lista"], True), ("2.14.1", ["-k", "lista"], True)]
    said = capsys.readouterr().out
    assert re.search(r"^FAILED  torch 2.10.0", said, re.MULTILINE) and re.search(
        r"^ok      torch 2.14.1", said, re.MULTILINE
    )
    assert matrix.main([*given, "--torch", "2.14.1"]) == 0
    assert asked[-1] == ("2.14.1", [], False)


def test_matrix_of_pythons_takes_those_found_and_the_torch_of_the_build():
    assert "torch==2.14.1" in pythons.requirements() and "ninja" in pythons.requirements()
    assert not [requirement for requirement in pythons.requirements() if "nvidia" in requirement]
    assert ".".join(map(str, sys.version_info[:2])) in pythons.pythons()
    with pytest.raises(SystemExit, match="Python 3.9 was not found here; there are: 3"):
        pythons.main(["--pythons", "3.9"])


# --- documentation ----------------------------------------------------------------------------------------------------

PAGES = {
    "functional": functional.__all__,
    "reference": functional.__all__,
    "layers": layers.__all__,
    "csc": layers.csc.__all__,
    "theory": theory.__all__,
}


def documented(page: str) -> list[str]:
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    return re.findall(r"^\.\. auto(?:function|class):: (\w+)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_each_public_name_stands_once_on_its_page(page):
    assert sorted(documented(page)) == sorted(PAGES[page])


def test_there_is_a_page_for_everything_public():
    modules = {name for name in dsc_ops.__all__ if inspect.ismodule(getattr(dsc_ops, name))}
    assert modules | {"csc"} == set(PAGES)
    assert {name for name in dsc_ops.__all__ if name not in modules} == set(layers.__all__)
    index = (ROOT / "docs" / "index.md").read_text().split()
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index"} == {line for line in index if line in pages}


@pytest.mark.parametrize(
    "name", layers.__all__ + [n for n in layers.csc.__all__ if inspect.isclass(getattr(layers.csc, n))]
)
def test_each_method_that_explains_itself_is_on_the_page(name):
    """The 1-D layers refer to the 2-D ones."""
    page, room = ("csc", layers.csc) if name in layers.csc.__all__ else ("layers", layers)
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    listed = re.search(rf"autoclass:: {name}\n(?:   :members: (.*))?", text)[1] or ""
    layer = getattr(room, name)
    methods = {
        key
        for key, value in inspect.getmembers(layer, callable)
        if not key.startswith("_") and value.__doc__ and getattr(value, "__module__", "").startswith("dsc_ops")
    }
    if name.endswith("1d"):
        name, listed = name[:-2], re.search(rf"autoclass:: {name[:-2]}\n   :members: (.*)", text)[1]
    assert methods == {member for member in listed.split(", ") if member and member != "__call__"}


def test_arguments_are_told_by_name():
    """What stands under "Args:" without a name would be shown as markup."""
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    sections = re.findall(r"\n( *)Args:\n(.*?)(?=\n\n|\n *\"\"\")", source, re.DOTALL)
    entries = []
    for indent, text in sections:
        entries += re.findall(rf"^ {{{len(indent) + 4}}}(\S.*)", text, re.MULTILINE)
    assert len(entries) > 80
    assert not [line for line in entries if not re.match(r"[\w, ]+: ", line)]


def test_each_module_with_examples_has_them_run():
    tried = {Path(module.__file__) for module in (*test_docstrings.MODULES, *test_theory_interface.MODULES)}
    assert {path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text()} == tried


def test_reference_has_the_names_that_are_documented():
    assert all(inspect.isfunction(getattr(reference, name)) for name in documented("reference"))
    assert _C.version == dsc_ops.__version__
