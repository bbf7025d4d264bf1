"""Exports the embedded model, serves it, and draws through gRPC what Python draws: `python -m serving.demo`."""

import argparse
import contextlib
import pathlib
import socket
import subprocess
import sys
import time

PROMPT, STEPS, SEED = "red apple on a blue background", 25, 7
MODELS = ("text_encoder", "diffusion_model", "decoder")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def server(models, *flags):
    """A server of a folder of models, until the block ends: a context that gives (gRPC port, REST port)."""
    import urllib3

    ports = free_port(), free_port()
    flags = [f"--port={ports[0]}", f"--rest_api_port={ports[1]}", *flags]
    process = subprocess.Popen([sys.executable, "-m", "serving", "serve", "--models", str(models), *flags])
    try:
        names = [
            path.name for path in pathlib.Path(models).iterdir() if path.is_dir() and not path.name.startswith(".")
        ]
        waiting, deadline = set(names), time.monotonic() + 300
        while waiting:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"The server does not serve {', '.join(sorted(waiting))}.")
            time.sleep(0.2)
            with contextlib.suppress(urllib3.exceptions.HTTPError):
                for name in list(waiting):
                    url = f"http://localhost:{ports[1]}/v1/models/{name}"
                    if "AVAILABLE" in urllib3.request("GET", url, retries=False).data.decode():
                        waiting.discard(name)
        yield ports
    finally:
        process.terminate()
        process.wait(timeout=30)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m serving.demo", description=__doc__.split(":")[0])
    parser.add_argument("--out", type=pathlib.Path, default="out", help="folder to write to")
    out = parser.parse_args(arguments).out

    import numpy as np

    from keras_sd import StableDiffusion
    from keras_sd.png import write_png
    from serving.client import Client

    models = out / "models"
    if not (models / "models.config").is_file():
        options = ["--preset", "emoji", "--out", str(models), "--only", *MODELS]
        subprocess.run([sys.executable, "-m", "export", *options], check=True)
    with server(models) as (port, _), Client(f"localhost:{port}") as client:
        served = client.text_to_image(PROMPT, num_steps=STEPS, seed=SEED)[0]
    drawn = StableDiffusion.from_preset("emoji").text_to_image(PROMPT, num_steps=STEPS, seed=SEED)[0]
    alike = np.mean(np.abs(served.astype(int) - drawn) <= 1)
    write_png(out / "served.png", served, PROMPT, Steps=STEPS, Seed=SEED)
    print(f"{out / 'served.png'}: {PROMPT}, through gRPC; {alike:.1%} of its pixels within 1/255 of Python's")
    return 0 if alike >= 0.999 else 1


if __name__ == "__main__":
    sys.exit(main())
