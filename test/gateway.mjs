// A gateway in 40 lines, without state: node gateway.mjs CONNECTION-STRING
//   POST /chat {"session", "message"} -> {"task"}
//   GET /chat/TASK/stream -> server-sent events; resumes after Last-Event-ID
//   POST /chat/TASK/stop -> {"stopped"}; to go away stops nothing
import { createServer } from 'node:http';
import pg from 'pg';

const pool = new pg.Pool({ connectionString: process.argv[2], max: 20 });
pool.on('error', (error) => console.error(error.message));
const one = async (call, values) => (await pool.query(`SELECT ${call} AS r`, values)).rows[0].r;
const reply = (response, body, status = 200) =>
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(body));

async function stream(response, task, last, protocol) {
  let text = await one('chat.sse($1, $2, $3)', [task, last, protocol]);
  if (text === null) return reply(response, { error: 'no such task' }, 404);
  response.writeHead(200, { 'content-type': 'text/event-stream',
    'cache-control': 'no-cache', 'x-vercel-ai-ui-message-stream': 'v1' });
  while (!response.destroyed) {
    response.write(text || ': nothing new\n\n');
    if (text.endsWith('data: [DONE]\n\n')) return response.end();
    last = [...text.matchAll(/^id: (\d+)$/gm)].at(-1)?.[1] ?? last;
    text = await one("chat.sse($1, $2, $3, '15 s')", [task, last, protocol]);
    // the message begins anew: end here, the client resumes from the start
    if (last > 0 && text.includes('\ndata: {"type":"start",')) return response.end();
  }
}

createServer(async (request, response) => {
  const url = new URL(request.url, 'http://gateway');
  const [, , task, verb] = url.pathname.split('/');
  try {
    if (request.method === 'GET' && verb === 'stream')
      return await stream(response, task, request.headers['last-event-id'] ?? 0,
        url.searchParams.get('protocol') ?? 7);
    if (verb === 'stop')
      return reply(response, { stopped: await one('chat.cancel_task($1)', [task]) });
    const { session, message } = JSON.parse((await request.toArray()).join(''));
    reply(response, { task: await one('chat.stream_chat_completion($1, $2)', [session, message]) });
  } catch (error) {
    response.headersSent ? response.destroy() : reply(response, { error: error.message }, 400);
  }
}).listen(0, '127.0.0.1', function () { console.log(`port=${this.address().port}`); });
