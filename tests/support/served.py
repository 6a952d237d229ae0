"""A server on loopback, and a tiny model that has learned to answer with a given text."""

import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from tokenizers import AddedToken, Tokenizer
from torch.nn.functional import cross_entropy

from llm.inference.chat_session import ChatSession
from llm.models.checkpoint import save_checkpoint
from llm.models.decoder.config import DecoderConfig
from llm.models.decoder.model import Decoder
from llm.tokenizer.tokenizer import TextTokenizer
from runner.serving.server import Server, ServerConfig


@contextmanager
def serving(sessions: Mapping[str, ChatSession], config: ServerConfig) -> Iterator[str]:
    """The address of a server of these models."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Server(sessions, config).app(), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listening.close()


def with_tokens(tokenizer: TextTokenizer, folder: Path, *texts: str) -> TextTokenizer:
    """The tokenizer with each of the texts as one more token, which is not special."""
    tokenizer.save(folder)
    opened = Tokenizer.from_file(str(folder / "tokenizer.json"))
    opened.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    opened.save(str(folder / "tokenizer.json"))
    return TextTokenizer.load(folder)


def taught(folder: Path, tokenizer: TextTokenizer, answer: str) -> ChatSession:
    """A model that answers with this text and its end token, whatever is asked: it looks at the last token alone."""
    tokenizer.save(folder)
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(hidden_size=64, layers=1, heads=2, context=512), vocab_size=tokenizer.vocab_size)
    torch.nn.init.zeros_(model.layers[0].self_attn.o_proj.weight).requires_grad_(False)  # type: ignore[union-attr]
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "?"}])[-1:]
    tokens = torch.tensor([*prompt, *tokenizer.encode(answer), tokenizer.end])
    assert len(set(tokens.tolist())) == len(tokens), "each token decides the next"
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(60):
        loss = cross_entropy(model(tokens[None, :-1])[0], tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, loss
    save_checkpoint(folder, model, folder)
    return ChatSession(folder)
