# SPDX-License-Identifier: Apache-2.0
"""The compiled parts only: everything static stands in pyproject.toml.

ZRAMFS_ONLY=zramfs.codecs.codec,...   builds only these extensions
ZRAMFS_SANITIZE=address|thread  builds with that sanitizer (address brings undefined with it)
ZRAMFS_WERROR=1                 turns compiler warnings into errors (scripts/test sets it)
ZRAMFS_OPTIMIZE='-O0 -g0'       instead of -O2 -g
ZRAMFS_BUILD_DIR=DIR            where the generated C goes, instead of build/cython
"""
import multiprocessing
import os
import shlex
import subprocess
import sys
import sysconfig
from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OPTIMIZE = os.environ.get("ZRAMFS_OPTIMIZE", "-O2 -g").split()
SANITIZE = os.environ.get("ZRAMFS_SANITIZE", "")
ONLY = {name for name in os.environ.get("ZRAMFS_ONLY", "").split(",") if name}


def pkg_config(package: str, minimum: str) -> dict[str, list[str]]:
    """Compiler and linker words for a C library, or an end with what to install."""
    try:
        subprocess.run(["pkg-config", f"--atleast-version={minimum}", package], check=True)
        words = shlex.split(
            subprocess.run(
                ["pkg-config", "--cflags", "--libs", package],
                check=True, capture_output=True, text=True,
            ).stdout
        )
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            f"zramfs needs {package} >= {minimum} and its pkg-config file; none was found. On Debian, "
            "for it and for pyfuse3: apt-get install gcc pkg-config python3-dev liblz4-dev libzstd-dev "
            "libfuse3-dev"
        )
    libs = [w for w in words if w.startswith(("-l", "-L"))]
    return {"extra_link_args": libs, "extra_compile_args": [w for w in words if w not in libs]}


def extension(name: str, *packages: tuple[str, str]) -> Extension:
    flags = {
        # -Wno-unused-*: Cython's own generated helpers, which our code does not call.
        "extra_compile_args": [
            "-std=gnu11", *OPTIMIZE, "-pthread", "-D_GNU_SOURCE", "-fno-strict-aliasing", "-Wall",
            "-Wextra", "-Wundef", "-Wno-unused-function", "-Wno-unused-parameter",
            "-Wno-missing-field-initializers",
        ],
        "extra_link_args": ["-pthread"],
    }
    if os.environ.get("ZRAMFS_WERROR"):
        flags["extra_compile_args"].append("-Werror")
    if SANITIZE:
        kinds = "address,undefined" if SANITIZE == "address" else SANITIZE
        extra = [f"-fsanitize={kinds}", "-fno-omit-frame-pointer", "-O1"]
        if SANITIZE == "address":
            extra.append("-fno-sanitize-recover=undefined")
        flags["extra_compile_args"] += extra
        flags["extra_link_args"] += extra
    for package, minimum in packages:
        for key, words in pkg_config(package, minimum).items():
            flags[key] += words
    path = name.replace(".", "/") + ".pyx"
    return Extension(
        name, [path], include_dirs=["allocator", "zramfs/store", "zramfs/lane"],
        depends=[*glob("allocator/*.h"), *glob("zramfs/*/*.h")], **flags,
    )


COMPRESSORS = (("liblz4", "1.9.0"), ("libzstd", "1.5.0"))

EXTENSIONS = [
    extension("allocator.populate"),
    extension("allocator.background"),
    extension("allocator.buddy"),
    extension("allocator.isolation"),
    extension("allocator.arena"),
    extension("allocator.headroom"),
    extension("allocator.migrate"),
    extension("allocator.compaction"),
    extension("allocator.zsmalloc"),
    extension("allocator.zscompact"),
    extension("allocator.zsmovable"),
    extension("allocator.pool"),
    extension("allocator.recovery"),
    extension("allocator.balloon"),
    extension("allocator.reserve"),
    extension("allocator.check"),
    extension("zramfs.codecs.dictionary", *COMPRESSORS),
    extension("zramfs.codecs.codec", *COMPRESSORS),
    extension("zramfs.codecs.stream", *COMPRESSORS),
    extension("zramfs.codecs.trainer", *COMPRESSORS),
    extension("zramfs.store.backing"),
    extension("zramfs.store.units"),
    extension("zramfs.store.back_units"),
    extension("zramfs.store.shared"),
    extension("zramfs.store.slots"),
    extension("zramfs.store.selection"),
    extension("zramfs.store.ranges"),
    extension("zramfs.store.access_times"),
    extension("zramfs.store.tables"),
    extension("zramfs.store.record", *COMPRESSORS),
    extension("zramfs.store.unit_recovery"),
    extension("zramfs.store.shared_recovery"),
    extension("zramfs.store.recovery"),
    extension("zramfs.store.check"),
    extension("zramfs.store.store"),
    extension("zramfs.store.secondary", *COMPRESSORS),
    extension("zramfs.store.resize"),
    extension("zramfs.store.candidates"),
    extension("zramfs.store.recompress"),
    extension("zramfs.store.unit_making"),
    extension("zramfs.store.back_upkeep"),
    extension("zramfs.store.share_table"),
    extension("zramfs.store.sharing"),
    extension("zramfs.store.sample"),
    extension("zramfs.store.estimate"),
    extension("zramfs.store.writeback"),
    extension("zramfs.store.save_pages"),
    extension("zramfs.store.saving"),
    extension("zramfs.store.restoring"),
    extension("zramfs.store.block_state"),
    extension("zramfs.lane.kept"),
    extension("zramfs.lane.metadata"),
    extension("zramfs.lane.opens"),
    extension("zramfs.lane.pieces"),
    extension("zramfs.lane.requests"),
    extension("zramfs.lane.slow"),
    extension("zramfs.lane.serve"),
    extension("zramfs.lane.workers"),
    extension("zramfs.lane.lane"),
    extension("zramfs.device.ballast"),
]

WANTED = [e for e in EXTENSIONS if not ONLY or e.name in ONLY]

# An sdist has the .pyx, from which each build makes its own C.
if not {"sdist", "egg_info", "dist_info"}.intersection(sys.argv):
    multiprocessing.set_start_method("fork", force=True)  # any other would run this file in each process
    WANTED = cythonize(
        WANTED,
        language_level=3,
        build_dir=os.environ.get("ZRAMFS_BUILD_DIR", "build/cython"),
        # What is to be made takes half a minute of processor time.
        nthreads=min(os.cpu_count() or 1, 8),
        compiler_directives={
            "boundscheck": False, "wraparound": False, "cdivision": True,
            "embedsignature": True, "warn.unreachable": True,
        },
    )

class BuildAll(build_ext):
    """The extensions, and the keeper, which is a program beside its Python files."""

    def run(self) -> None:
        super().run()
        if ONLY and "zramfs.keeper" not in ONLY:
            return
        place = "zramfs/keeper" if self.inplace else os.path.join(self.build_lib, "zramfs/keeper")
        os.makedirs(place, exist_ok=True)
        compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
        words = [*compiler, *shlex.split(os.environ.get("CFLAGS", "")),
                 "-std=gnu11", "-O2", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wundef",
                 *(["-Werror"] if os.environ.get("ZRAMFS_WERROR") else []), "-ffunction-sections",
                 "-Wl,--gc-sections", "-s", "-o", f"{place}/zramfs-keeper.new", "zramfs/keeper/keeper.c"]
        # Alone it takes 0.9 MiB; with the system's C library it would lock 2 MiB of that, too.
        if subprocess.run([*words, "-static"], capture_output=True).returncode != 0:
            subprocess.run(words, check=True)
        os.chmod(f"{place}/zramfs-keeper.new", 0o755)  # whatever the umask: a wheel takes the mode along
        # One that runs can't be written to.
        os.replace(f"{place}/zramfs-keeper.new", f"{place}/zramfs-keeper")


# parallel: pip and build have no -j; a wheel took 9 s on two cores, and 17 s without it.
setup(ext_modules=WANTED, cmdclass={"build_ext": BuildAll},
      options={"build_ext": {"parallel": os.cpu_count()}})
