"""The start command `demo`."""
import argparse


def launch() -> None:
    """Serve the game until a signal comes."""
    import uvicorn
    parser = argparse.ArgumentParser(description="Serve the environment demo.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run("agentenv_demo:app", host=options.host, port=options.port)
