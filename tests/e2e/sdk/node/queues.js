// rhea against a server of plain queues on the port of the first argument: what it does is in
// src/queues.rs, what came of it is printed as one JSON object.
'use strict';

const rhea = require('rhea');

const port = Number(process.argv[2]);
const SENT = 100;

// Until `emitter` says one of `names`; which one, and its context.
function until(emitter, names) {
  return new Promise((resolve) => {
    const listeners = names.map((name) => {
      const listener = (context) => {
        listeners.forEach(([each, its]) => emitter.removeListener(each, its));
        resolve({ name, context });
      };
      emitter.once(name, listener);
      return [name, listener];
    });
  });
}

async function connect(options) {
  const connection = rhea
    .create_container()
    .connect({ host: '127.0.0.1', port, reconnect: false, ...options });
  const ends = ['connection_open', 'connection_error', 'disconnected'];
  const { name } = await until(connection, ends);
  connection.on('connection_error', () => {});
  return { connection, open: name === 'connection_open' };
}

async function sender(connection, address) {
  const link = connection.open_sender({ target: address, treat_modified_as_released: false });
  const { name, context } = await until(link, ['sendable', 'sender_error']);
  if (name === 'sendable') return link;
  const condition = context.sender.error.condition;
  link.on('sender_error', () => {});
  return condition;
}

async function outcome(link, body) {
  link.send({ body });
  const ends = ['accepted', 'rejected', 'released', 'modified'];
  return (await until(link, ends)).name;
}

// Receives `count` messages one by one; `settle` says how each is settled.
async function receive(connection, address, count, settle) {
  const link = connection.open_receiver({
    source: address,
    credit_window: 0,
    autoaccept: false,
  });
  await until(link, ['receiver_open']);
  const bodies = [];
  while (bodies.length < count) {
    const arrives = until(link, ['message']);
    link.add_credit(1);
    const { context } = await arrives;
    bodies.push(context.message.body);
    context.delivery[settle(bodies.length)]();
  }
  // With the queue empty, drained credit comes back.
  link.drain = true;
  const drained = until(link, ['receiver_drained']);
  link.add_credit(1);
  await drained;
  const closed = until(link, ['receiver_close']);
  link.close();
  await closed;
  return bodies;
}

async function main() {
  const seen = {};
  const { connection } = await connect({});
  const queue = await sender(connection, 'q');
  const bodies = [];
  for (let index = 0; index < SENT; index += 1) bodies.push(`message ${index}`);
  bodies.push('x'.repeat(200000));
  const outcomes = [];
  for (const body of bodies) outcomes.push(await outcome(queue, body));
  seen.accepted = outcomes.filter((name) => name === 'accepted').length;
  const settle = (number) => (number === 1 ? 'release' : number === 3 ? 'reject' : 'accept');
  const arrived = await receive(connection, 'q', bodies.length + 1, settle);
  // The first one was given back and comes again.
  seen.again = arrived[0] === bodies[0] && arrived[1] === bodies[0];
  seen.in_order = JSON.stringify(arrived.slice(1)) === JSON.stringify(bodies);
  seen.dead = await receive(connection, 'q.dead', 1, () => 'accept');

  seen.outcomes = [];
  for (const address of ['$reject', '$release', '$modify']) {
    seen.outcomes.push(await outcome(await sender(connection, address), 'x'));
  }
  const refused = await sender(connection, '$forbidden');
  seen.refused = typeof refused === 'string' ? refused : null;
  seen.still_works = await outcome(queue, 'last');
  const closed = until(connection, ['connection_close', 'disconnected']);
  connection.close();
  seen.closed = (await closed).name === 'connection_close';

  for (const [name, password] of [['plain', 'open-sesame'], ['wrong', 'guess']]) {
    const tried = await connect({ username: 'somebody', password });
    seen[name] = tried.open;
    if (tried.open) tried.connection.close();
  }
  process.stdout.write(`${JSON.stringify(seen)}\n`);
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
