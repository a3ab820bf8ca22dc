"""Small file systems in memory, to be filled."""

import contextlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Disk:
    """A file system at `folder`."""

    folder: Path

    def mount(self, size_bytes: int) -> bool:
        """Mount it; False without the permission."""
        self.folder.mkdir()
        return self._mount(f"size={size_bytes}").returncode == 0

    def unmount(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def leave(self, free_bytes: int) -> None:
        """Resize it to this many free bytes."""
        used_bytes = shutil.disk_usage(self.folder).used
        assert self._mount(f"remount,size={used_bytes + free_bytes}").returncode == 0

    def fill(self) -> None:
        """Take all that is free."""
        with (self.folder / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * PAGE_BYTES):
                pass

    def make_room(self) -> None:
        """Give back what `fill` took."""
        (self.folder / "filler").unlink()

    def _mount(self, options: str) -> subprocess.CompletedProcess[bytes]:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return subprocess.run(command, check=False, capture_output=True)
