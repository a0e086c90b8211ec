// rhea against a server of plain queues on the port of the first argument
// (proto/amqp/tests/interop.rs): what came of it is printed as one JSON object.
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

// Neither side waits for the other to settle.
async function settled(connection) {
  const link = connection.open_sender({ target: 'settled', snd_settle_mode: 1 });
  await until(link, ['sendable']);
  const bodies = [];
  for (let index = 0; index < SENT; index += 1) {
    bodies.push(`settled ${index}`);
    if (!link.sendable()) await until(link, ['sendable']);
    link.send({ body: bodies[index] });
  }
  const receiver = connection.open_receiver({
    source: 'settled',
    snd_settle_mode: 1,
    credit_window: 10,
  });
  const arrived = [];
  await new Promise((resolve) => {
    // Several come with one read.
    receiver.on('message', (context) => {
      arrived.push(context.delivery.remote_settled ? context.message.body : 'not settled');
      if (arrived.length === SENT) resolve();
    });
  });
  return JSON.stringify(arrived) === JSON.stringify(bodies);
}

// Sessions beside each other, each with links and a queue of its own.
async function many(connection) {
  const run = async (index) => {
    const session = connection.create_session();
    session.begin();
    const queue = `many ${index}`;
    const sent = await outcome(await sender(session, queue), queue);
    const arrived = await receive(session, queue, 1, () => 'accept');
    const closed = until(session, ['session_close']);
    session.close();
    await closed;
    return sent === 'accepted' && arrived[0] === queue;
  };
  const all = await Promise.all(Array.from({ length: 50 }, (_, index) => run(index)));
  return all.every((good) => good);
}

// Heartbeats keep a connection on which nothing happens, for longer than its time-out.
async function idle() {
  const { connection } = await connect({ idle_time_out: 5000 });
  const lost = until(connection, ['disconnected', 'connection_close']).then(() => false);
  const stays = new Promise((resolve) => setTimeout(() => resolve(true), 12000));
  if (!(await Promise.race([lost, stays]))) return false;
  const sent = await outcome(await sender(connection, 'idle'), 'alive');
  connection.close();
  return sent === 'accepted';
}

async function main() {
  const seen = {};
  const { connection } = await connect({});
  seen.settled = await settled(connection);
  seen.many = await many(connection);
  seen.idle = await idle();
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
