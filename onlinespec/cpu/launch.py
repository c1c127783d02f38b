"""Run SGLang's server on a CPU without AMX: `python -m onlinespec.cpu.launch <sglang flags>`.

The kernels are installed at the top level because SGLang spawns its scheduler: the child imports this file again, as
`__mp_main__`, and so has the kernels before it imports SGLang. The environment is set first of all since torch reads
OMP_NUM_THREADS when it is imported. Where a GPU is present this is `python -m sglang.launch_server`, nothing added.
"""

import os
import sys

from onlinespec.cpu import settings

IS_NEEDED = settings.is_needed()
if IS_NEEDED:
    for _name, _value in settings.environment(sys.argv[1:]).items():
        os.environ.setdefault(_name, _value)

from onlinespec.cpu.install import install  # noqa: E402

install()

# Source: SGLang 0.5.23, launch_server.py, the block under __main__. Imported here, not above, so that a spawned child
# loads no more of SGLang than it needs.
if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    _user_flags = sys.argv[1:]
    _added_flags = settings.flags(_user_flags) if IS_NEEDED else []
    try:
        run_server(prepare_server_args([*_user_flags, *_added_flags]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
