// Reads chat.sse()'s text on standard input as an application's client does:
// with npm's ai, which checks each event and builds the message.
//
//	node verify.mjs 6|7		prints {"chunks", "done", "message", "error"}

import { readFileSync } from 'node:fs';

const ai = await import(`ai${process.argv[2]}`);
const text = readFileSync(0);
const chunks = [];
let message = null;
let error = null;

// in pieces that split lines and characters
const body = new ReadableStream({
  start(controller) {
    for (let i = 0; i < text.length; i += 7)
      controller.enqueue(new Uint8Array(text.subarray(i, i + 7)));
    controller.close();
  },
});
for await (const part of ai.parseJsonEventStream({
  stream: body,
  schema: ai.uiMessageChunkSchema(),
})) {
  if (!part.success)
    throw new Error(`not of the protocol: ${part.error}`);
  chunks.push(part.value);
}

const stream = new ReadableStream({
  start(controller) {
    chunks.forEach((chunk) => controller.enqueue(chunk));
    controller.close();
  },
});
for await (const next of ai.readUIMessageStream({
  stream,
  onError: (e) => { error = e.message; },
}))
  message = next;

console.log(JSON.stringify({
  chunks,
  done: text.toString().endsWith('data: [DONE]\n\n'),
  message,
  error,
}));
