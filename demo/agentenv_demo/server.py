"""The HTTP server."""
from typing import Any

from fastapi import FastAPI

from .environment import Environment
from .model import CloseRequest, CreateRequest, ResetRequest, StepRequest

app = FastAPI()
environment = Environment()

# `async` although nothing waits: a plain function would go through a thread pool, which costs more than the game.


@app.get("/")
async def hello() -> str:
    return "This is environment demo."


@app.post("/create")
async def create(body: CreateRequest) -> Any:
    return environment.create()


@app.post("/reset")
async def reset(body: ResetRequest) -> Any:
    return environment.reset(body.id, body.data_idx)


@app.post("/step")
async def step(body: StepRequest) -> Any:
    return environment.step(body.id, body.action)


@app.get("/observation")
async def observation(id: int) -> Any:
    return environment.observe(id)


@app.post("/close")
async def close(body: CloseRequest) -> bool:
    return environment.close(body.id)
