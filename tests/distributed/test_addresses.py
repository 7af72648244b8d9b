"""The address that a node uses towards the others, with the answers of its resolver and kernel given."""

import socket
from collections.abc import Mapping

import pytest

from distributed.addresses import (
    LOOPBACK,
    Network,
    check_own_name,
    look_up,
    own_address,
    rendezvous_address,
    set_interfaces,
    source_address,
)
from distributed.health.control_channel import _connect
from distributed.health.messages import Hello
from distributed.topology import Topology, TopologyError
from runtime.interfaces import interface_addresses

# Ranks 0 and 1 of two nodes; one node's rank 1 of 2.
FIRST = Topology("srun", 0, 2, 0, 1, 0, "n1")
SECOND = Topology("srun", 1, 2, 0, 1, 1, "n2")
ONE_NODE = Topology("torchrun", 1, 2, 1, 2, 0, "n1")
SRUN = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "1"}

ETHERNET = [("lo", "127.0.0.1"), ("eth0", "10.0.0.1"), ("lo", "::1")]
TWO_NETWORKS = [*ETHERNET, ("ib0", "10.1.0.1"), ("ib0", "fd00::1")]

RIGHT = {"n1": "10.0.0.1", "n2": "10.0.0.2"}
DEBIAN = {"n1": "127.0.1.1", "n2": "10.0.0.2"}


def network(
    names: Mapping[str, str], interfaces: list[tuple[str, str]] = TWO_NETWORKS, routes: str = "10.0. 10.1."
) -> Network:
    """A host with these names in its hosts file, these addresses, and ways to addresses that begin with one of `routes`."""

    def look_up(host: str) -> str:
        if host[0].isdigit():
            return host
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return names[host]

    def source_address(address: str) -> str:
        if address.startswith("127."):
            return LOOPBACK
        for route in routes.split():
            if address.startswith(route):
                return next(own for _, own in interfaces if own.startswith(route))
        raise OSError(101, "Network is unreachable")

    return Network(look_up, source_address, lambda: interfaces)


@pytest.mark.parametrize(
    ("names", "interfaces", "environ", "address"),
    [
        (RIGHT, TWO_NETWORKS, {}, "10.0.0.1"),
        # The other node shows the way, whatever this one calls itself.
        (DEBIAN, TWO_NETWORKS, SRUN, "10.0.0.1"),
        ({"n1": "10.1.0.1", "n2": "10.0.0.2"}, TWO_NETWORKS, SRUN, "10.0.0.1"),
        ({"n2": "10.0.0.2"}, TWO_NETWORKS, SRUN, "10.0.0.1"),
        (RIGHT, TWO_NETWORKS, SRUN | {"MASTER_ADDR": "10.1.0.1"}, "10.1.0.1"),
        (DEBIAN, TWO_NETWORKS, {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.1.0.7"}, "10.1.0.1"),
        # One address leaves no choice.
        (DEBIAN, ETHERNET, {}, "10.0.0.1"),
        ({}, ETHERNET, {"MASTER_ADDR": "n1"}, "10.0.0.1"),
        ({}, [("lo", "127.0.0.1"), ("eth0", "fd00::1")], {}, "fd00::1"),
        # A variable decides; NCCL's names are prefixes.
        (RIGHT, TWO_NETWORKS, SRUN | {"TSM_NETWORK_INTERFACE": "ib0", "GLOO_SOCKET_IFNAME": "eth0"}, "10.1.0.1"),
        (RIGHT, TWO_NETWORKS, {"GLOO_SOCKET_IFNAME": "ib0,eth0"}, "10.0.0.1"),
        (RIGHT, TWO_NETWORKS, {"NCCL_SOCKET_IFNAME": "ib"}, "10.1.0.1"),
        (RIGHT, TWO_NETWORKS, {"NCCL_SOCKET_IFNAME": "=ib0"}, "10.1.0.1"),
        (RIGHT, TWO_NETWORKS, {"NCCL_SOCKET_IFNAME": "^ib0"}, "10.0.0.1"),
        # All nodes of an emulated cluster may be one machine.
        (DEBIAN, TWO_NETWORKS, {"TSM_NETWORK_INTERFACE": "lo"}, LOOPBACK),
    ],
)
def test_the_address_for_other_nodes(
    names: Mapping[str, str], interfaces: list[tuple[str, str]], environ: Mapping[str, str], address: str
) -> None:
    assert own_address(FIRST, environ, network(names, interfaces)) == address


def test_one_node_needs_no_network() -> None:
    assert own_address(ONE_NODE, {"TSM_NETWORK_INTERFACE": "ib0"}, network({}, [])) == LOOPBACK
    assert rendezvous_address(ONE_NODE, SRUN, network({}, [])) == (LOOPBACK, 20_007)


@pytest.mark.parametrize("names", [DEBIAN, {}])
def test_several_addresses_and_no_name_are_refused(names: Mapping[str, str]) -> None:
    with pytest.raises(
        TopologyError, match=r"n1 .*eth0 10.0.0.1, .*ib0 10.1.0.1.*Fix: TSM_NETWORK_INTERFACE.*/etc/hosts"
    ):
        own_address(FIRST, {"MASTER_ADDR": "n1"}, network(names))


@pytest.mark.parametrize("variable", ["TSM_NETWORK_INTERFACE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_an_interface_that_is_not_there_is_refused(variable: str) -> None:
    with pytest.raises(TopologyError, match=f"{variable}=ib7, but n1 .*ib0 10.1.0.1.*Fix: {variable}="):
        own_address(FIRST, {variable: "ib7"}, network(RIGHT))


# --- Rendezvous -------------------------------------------------------------------------------------------------------


def test_both_nodes_go_to_the_same_rendezvous() -> None:
    of_second = [("lo", "127.0.0.1"), ("eth0", "10.0.0.2"), ("ib0", "10.1.0.2")]
    assert rendezvous_address(FIRST, SRUN, network(DEBIAN)) == ("10.0.0.1", 20_007)
    names = {"n1": "10.0.0.1", "n2": "127.0.1.1"}
    assert rendezvous_address(SECOND, SRUN, network(names, of_second)) == ("10.0.0.1", 20_007)


def test_a_rendezvous_that_is_the_node_itself_is_refused() -> None:
    names = {"n1": "127.0.1.1", "n2": "10.0.0.2"}
    for environ in (SRUN, SRUN | {"MASTER_ADDR": "127.0.0.1"}):
        with pytest.raises(
            TopologyError, match=r"rank 1 on n2 .*127.0.*itself.*Fix: .*/etc/hosts on n2, or MASTER_ADDR"
        ):
            rendezvous_address(SECOND, environ, network(names))
    one_machine = SRUN | {"MASTER_ADDR": "127.0.0.1", "TSM_NETWORK_INTERFACE": "lo"}
    assert rendezvous_address(SECOND, one_machine, network(names)) == (LOOPBACK, 20_007)


def test_a_host_of_rank_0_without_an_address_is_refused() -> None:
    for place in (FIRST, SECOND):
        with pytest.raises(TopologyError, match="cannot look up n1.*Fix: MASTER_ADDR"):
            rendezvous_address(place, SRUN, network({}))


# --- Interfaces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "environ", "expected"),
    [
        (FIRST, SRUN, {"GLOO_SOCKET_IFNAME": "eth0", "HOROVOD_GLOO_IFACE": "eth0"}),
        (ONE_NODE, {}, dict.fromkeys(("GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME"), "lo")),
        (ONE_NODE, {"NCCL_SOCKET_IFNAME": "eth0"}, {"GLOO_SOCKET_IFNAME": "lo", "HOROVOD_GLOO_IFACE": "lo"}),
        (
            FIRST,
            {"TSM_NETWORK_INTERFACE": "ib0"},
            dict.fromkeys(("GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE", "NCCL_SOCKET_IFNAME"), "ib0"),
        ),
    ],
)
def test_libraries_get_the_same_interface(place: Topology, environ: dict[str, str], expected: dict[str, str]) -> None:
    changed = dict(environ)
    set_interfaces(place, changed, network(DEBIAN))
    assert changed == environ | expected


@pytest.mark.parametrize(
    ("place", "names", "refused"),
    [
        (FIRST, RIGHT, None),
        (FIRST, DEBIAN, "is 127.0.1.1.*`10.0.0.1 n1`"),
        (FIRST, {"n2": "10.0.0.2"}, "does not resolve.*`10.0.0.1 n1`"),
        (ONE_NODE, DEBIAN, None),
        (ONE_NODE, {}, "does not resolve.*`127.0.0.1 n1`"),
    ],
)
def test_horovod_needs_the_hosts_own_name(place: Topology, names: Mapping[str, str], refused: str | None) -> None:
    if refused is None:
        check_own_name(place, SRUN, network(names))
        return
    with pytest.raises(TopologyError, match=f"on n1: .*own name, which {refused} in /etc/hosts"):
        check_own_name(place, SRUN, network(names))


@pytest.mark.parametrize("error", [TimeoutError("timed out"), OSError(113, "No route to host")])
def test_a_monitor_that_the_network_does_not_lead_to_is_refused(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_connection(address: tuple[str, int], timeout: float) -> socket.socket:
        raise error

    monkeypatch.setattr(socket, "create_connection", create_connection)
    with pytest.raises(
        TopologyError, match=r"rank 1 on n2 .*10\.1\.0\.1 port 4000: .*(timed out|No route).*Fix: TSM_NETWORK_INTERFACE"
    ):
        _connect(("10.1.0.1", 4000), Hello(1, "n2", 1, "token"))


def test_this_machines_own_answers() -> None:
    addresses = interface_addresses()
    assert ("lo", LOOPBACK) in addresses
    assert all(source_address(address) == address for _, address in addresses if ":" not in address)
    assert look_up("localhost") == LOOPBACK
    with pytest.raises(socket.gaierror):
        look_up("a name with blanks")
