"""Both ends of each transport, with each receiver in a process of its own."""

import subprocess
import sys
from datetime import timedelta
from functools import partial

import pytest
import torch

from learner.push import Sender
from sdft_dist.transport import connect
from sdft_dist.types import Bucket

RECEIVER = """
import sys
from datetime import timedelta
import torch
from sdft_dist.transport import connect

kind, port, rank, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), torch.device(sys.argv[4])
timeout = timedelta(seconds=60)
store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
end = connect(kind, store, rank, 3, timeout, device)
for size in (1000, 8):
    message = end.receive(size)
    print(int(message[3:].long().sum()), flush=True)
    message[rank] = 100 + rank
    end.taken()
sys.stdin.read()
end.close()
"""


def needs_gpus(number):
    lacking = torch.cuda.device_count() < number
    return [pytest.mark.gpu, pytest.mark.skipif(lacking, reason=f"needs {number} CUDA GPUs")]


@pytest.mark.parametrize(
    ("kind", "shared", "devices"),
    [
        ("gloo", False, ["cpu"] * 3),
        ("ipc", True, ["cpu"] * 3),
        pytest.param("ipc", True, ["cuda:0"] * 3, marks=needs_gpus(1)),
        pytest.param("nccl", False, ["cuda:0", "cuda:1", "cuda:2"], marks=needs_gpus(3)),
    ],
)
def test_every_receiver_gets_every_message(kind, shared, devices):
    timeout = timedelta(seconds=60)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    receivers = [
        subprocess.Popen(
            [sys.executable, "-c", RECEIVER, kind, str(store.port), str(rank), devices[rank]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for rank in (1, 2)
    ]  # fmt: skip
    end = connect(kind, store, 0, 3, timeout, torch.device(devices[0]))
    bytes_of = partial(torch.tensor, dtype=torch.uint8, device=end.device)
    messages = bytes_of([i % 256 for i in range(1000)]), bytes_of([7] * 8)
    for message in messages:
        end.send(message)
        written = [int(message[1]), int(message[2])]
        assert (written == [101, 102]) is shared, "memory is shared, or copied"
    for process in receivers:
        told, _ = process.communicate(timeout=60)
        assert [int(line) for line in told.split()] == [int(m[3:].long().sum()) for m in messages]
    if kind != "nccl":  # which notices after its timeout only
        with pytest.raises(RuntimeError):  # they have gone
            end.send(messages[1])
    end.close()


def test_a_sender_that_fails_says_why_and_lets_nobody_wait(capsys):
    closed = []

    class Broken:
        device = torch.device("cpu")

        def send(self, message):
            raise RuntimeError("CUDA error: invalid argument")

        def close(self):
            closed.append(True)

    sender = Sender("127.0.0.1", 1, 5.0, "gloo", torch.device("cpu"))
    sender._transport = Broken()
    sender.send(Bucket(names=("w",), dtypes=("float32",), shapes=((2,),)), {"w": torch.zeros(2)})
    sender.flush()
    assert closed
    assert "CUDA error: invalid argument" in capsys.readouterr().err
    sender.close()
