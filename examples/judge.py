"""Two rewards with weights: the verdict of a server, asked for many answers at once, and what a
long answer costs.

    python examples/judge.py &                                     # the server, until you end it
    jspec train examples/judge.yaml

The server stands in for a judge model or a sandbox: it takes a tenth of a second for each answer.
`judge` is `async`, so `reward.concurrency` of its calls wait for it at once: a step's 128 answers
take half a second. An answer whose call fails, or lasts longer than `timeout_s`, scores 0 and is
counted; no other one is harmed.
"""

import asyncio
import json

HOST, PORT = "127.0.0.1", 8765


async def judge(messages: list, answer: str, port: int = PORT, **meta) -> float:
    """The server's verdict on a conversation whose last message is the policy's answer."""
    body = json.dumps({"messages": messages, "answer": answer}).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(b"POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        _, verdict = (await reader.read()).split(b"\r\n\r\n", 1)
        return json.loads(verdict)["score"]
    finally:
        writer.close()


def score(messages: list, answer: str) -> float:
    """The share of the answer's characters that the last message has in their places."""
    said = messages[-1]["content"]
    return sum(a == b for a, b in zip(answer, said, strict=False)) / len(answer)


async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.partition(b"Content-Length: ")[2].split()[0])
    asked = json.loads(await reader.readexactly(length))
    await asyncio.sleep(0.1)
    writer.write(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps({"score": score(**asked)}).encode())
    await writer.drain()
    writer.close()


async def serve(port: int = PORT) -> None:
    """Answers until it is ended."""
    async with await asyncio.start_server(answered, HOST, port) as server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
