// Reads chat.to_ui_messages()'s array on standard input as an application does:
// npm's ai checks it, and makes of it what it would send to a model.
//
//	node ui.mjs 6|7		prints {"messages", "model"}; an error where it is none

import { readFileSync } from 'node:fs';

const ai = await import(`ai${process.argv[2]}`);
const messages = await ai.validateUIMessages({
  messages: JSON.parse(readFileSync(0, 'utf8')),
});
const model = await ai.convertToModelMessages(messages);

console.log(JSON.stringify({ messages, model }));
