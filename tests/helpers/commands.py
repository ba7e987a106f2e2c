"""The commands of tools/ in this process, without the seconds of their imports."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

from click.testing import CliRunner, Result

TOOLS = Path(__file__).parents[2] / "tools"


def invoke(tool: str, *arguments: object, stdin: str = "") -> Result:
    """What a command did with arguments, which may be of any type."""
    spec = spec_from_loader(tool, SourceFileLoader(tool, str(TOOLS / tool)))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.path.insert(0, str(TOOLS))  # as Python does for a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return CliRunner().invoke(module.main, list(map(str, arguments)), input=stdin)
