// npm's aimock behind the commands of the bundled fake endpoint, so that the
// same tests run against both.  Answers, chunks and errors are aimock's; here
// are the reading of the directives, the gates and the record of requests.
//
//	node same.mjs DIRECTORY-OF-NODE_MODULES
//
// Prints "port=N"; ends when its standard input does.  Of the directives (see
// fake_llm.c) it knows those that aimock has something for; any other one is
// answered with status 400.
import http from 'node:http';
import { createRequire } from 'node:module';
import path from 'node:path';

const require = createRequire(path.join(process.argv[2], 'x.js'));
const { LLMock } = require('@copilotkit/aimock');
const known = /^(tokens|text|repeat|reasoning|tool|args|id|status|errmsg|errcode|retry_after|gate|times|key|thentext|delay|x)$/;
const failed = new Map();	// directive or key => how often it has failed
const gates = new Map();	// name => { waiting: [function], passes, watchers }
const stats = { requests: 0, active: 0, aborted: 0 };
let records = [];

const text = (m) => typeof m?.content === 'string' ? m.content
	: (m?.content ?? []).map((p) => p.text ?? '').join('');

// Reads the directives of a request: pairs, as the last message has them.
function directives(body) {
	const block = text(body.messages.filter((m) => m.role === 'user').at(-1)).match(/\[\[(.*?)\]\]/s)?.[1];
	return (block ?? '').split(/\s+/).filter(Boolean).map((pair) => {
		const at = pair.indexOf('=');
		return [pair.slice(0, at), decodeURIComponent(pair.slice(at + 1))];
	});
}

const words = (letter, n) => Array.from({ length: n }, (_, i) => `${letter}${i} `).join('');

// Returns aimock's fixture response for a request.
function answer(body) {
	const pairs = directives(body);
	const d = Object.fromEntries(pairs);
	const odd = pairs.find(([name]) => !known.test(name));
	if (odd) return { error: { message: `unknown directive ${odd[0]}` }, status: 400 };
	if (d.status) {
		const key = d.key ?? JSON.stringify(pairs);
		failed.set(key, (failed.get(key) ?? 0) + 1);
		if (!d.times || failed.get(key) <= Number(d.times))
			return {
				error: { message: d.errmsg ?? 'failed', type: 'invalid_request_error', code: d.errcode },
				status: Number(d.status), ...(d.retry_after && { retryAfter: Number(d.retry_after) }),
			};
	}
	if (d.tool && body.messages.at(-1).role !== 'tool') {
		const calls = [];
		for (const [name, value] of pairs)
			if (name === 'tool') calls.push({ name: value, arguments: '{}', id: `call_${calls.length}` });
			else if (name === 'args') calls.at(-1).arguments = value;
			else if (name === 'id') calls.at(-1).id = value;
		return { toolCalls: calls };
	}
	const content = d.tool ? d.thentext ?? `Tool said: ${text(body.messages.at(-1))}`
		: d.text !== undefined ? d.text.repeat(Number(d.repeat ?? 1))
		: words('t', Number(d.tokens ?? 5));
	return { content, ...(d.reasoning && { reasoning: words('r', Number(d.reasoning)) }) };
}

const gate = (name) => gates.get(name) ??
	gates.set(name, { waiting: [], passes: 0, watchers: [] }).get(name);

// Lets through what may pass, and tells who counts those that wait.
function turn(g) {
	while (g.passes > 0 && g.waiting.length > 0) {
		g.passes--;
		g.waiting.shift()();
	}
	g.watchers = g.watchers.filter((w) => w.n > g.waiting.length || w.tell());
}

const json = (res, value) => {
	const body = JSON.stringify(value);
	res.writeHead(200, { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(body) });
	res.end(body);
};

// The commands of the fake endpoint.
function command(req, res, url) {
	const [, what, name] = url.pathname.split('/');
	if (what === 'stats') return json(res, stats);
	if (what === 'requests') {
		if (req.method === 'DELETE') records = [];
		return json(res, url.searchParams.get('last') ? records.slice(-1) : records);
	}
	const g = gate(name);
	if (req.method === 'POST') {
		g.passes += Number(url.searchParams.get('n') ?? 1);
		turn(g);
		return json(res, { waiting: g.waiting.length, passes: g.passes });
	}
	const tell = () => { json(res, { waiting: g.waiting.length, passes: g.passes }); };
	g.watchers.push({ n: Number(url.searchParams.get('wait') ?? 0), tell });
	turn(g);
}

const mock = new LLMock({ port: 0, host: '127.0.0.1' });
mock.on({ predicate: () => true }, (body) => answer(body), { chunkSize: 3 });
await mock.start();
const target = new URL(mock.url);

// Hands a request on to aimock, and its answer back as it comes.
async function forward(req, res, raw) {
	const body = raw.length > 0 ? JSON.parse(raw) : null;
	const record = { method: req.method, path: req.url, headers: req.headers, body, aborted: false };
	records.push(record);
	stats.requests++;
	stats.active++;
	const name = body?.messages && Object.fromEntries(directives(body)).gate;
	if (name) {
		const g = gate(name);
		await new Promise((go) => { g.waiting.push(go); turn(g); });
	}
	const up = http.request({ host: target.hostname, port: target.port, method: req.method, path: req.url, headers: req.headers },
		(from) => {
			res.writeHead(from.statusCode, from.headers);
			from.pipe(res);
		});
	up.on('error', () => res.destroy());
	res.on('close', () => {
		stats.active--;
		if (!res.writableFinished) {
			record.aborted = true;
			stats.aborted++;
			up.destroy();
		}
	});
	up.end(raw);
}

const server = http.createServer((req, res) => {
	const url = new URL(req.url, 'http://x');
	const chunks = [];
	req.on('data', (c) => chunks.push(c));
	req.on('end', () => {
		if (/^\/(requests|stats|gate)\b/.test(url.pathname)) command(req, res, url);
		else forward(req, res, Buffer.concat(chunks));
	});
});
server.listen(0, '127.0.0.1', () => console.log(`port=${server.address().port}`));
process.stdin.on('end', () => process.exit(0));
process.stdin.resume();
