"""The other programs that find circuits: which scripts time them, and how one that cannot run is left out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.bench.peer import PEERS, PeerError, interpreter, run_script

SCRIPTS = {
    "auto_circuit": PEERS / "edge_scores_auto_circuit.py",
    "eap_ig_package": PEERS / "edge_scores_eap_ig.py",
    "transformer_lens": PEERS / "edge_scores_transformer_lens.py",
    "loop": PEERS / "exact_edges_loop.py",
    "acdc": PEERS / "acdc_reference.py",
}


class Peers:
    """Runs the scripts of the peers; one that fails is left out from then on, after a line that says why.

    Attributes:
      versions: of the packages of every peer that ran.
    """

    def __init__(self, pythons: Mapping[str, str], eap_ig_source: str, console: Console, *, used: bool, threads: int):
        """Prepares nothing yet: an environment is made when its script is first run.

        Args:
          pythons: by peer, an interpreter to use as it is; one that is empty stands for an environment made for it.
          eap_ig_source: the folder src of a checkout of the EAP-IG package; empty leaves that peer out.
          console: where the lines are printed.
          used: false leaves all out, without a line.
          threads: of every peer.
        """
        self._pythons, self._source, self._console, self._threads = pythons, eap_ig_source, console, threads
        self._left_out = set() if used else set(SCRIPTS)
        self.versions: dict[str, str] = {}

    def run(self, peer: str, *options: str) -> dict[str, Any] | None:
        """What the script of a peer prints; None where the peer is left out."""
        if peer in self._left_out:
            return None
        try:
            python = self._interpreter(peer)
            source = (f"--source={self._source}",) if peer == "eap_ig_package" else ()
            found = run_script(python, SCRIPTS[peer], f"--threads={self._threads}", *source, *options)
        except PeerError as error:
            self._left_out.add(peer)
            self._console.print(f"without {peer}: {error}", markup=False, soft_wrap=True)
            return None
        self.versions |= {f"peer.{peer}.{package}": version for package, version in found["versions"].items()}
        return found

    def _interpreter(self, peer: str) -> Path:
        if peer == "eap_ig_package" and not self._source:
            raise PeerError(
                "the EAP-IG package is not on PyPI; clone https://github.com/hannamw/EAP-IG and give its folder src "
                "with --config.eap_ig_source=DIR"
            )
        return interpreter(SCRIPTS[peer], self._pythons.get(peer, ""))
