// rhea against a server of plain queues on the port of the first argument
// (proto/amqp/tests/interop.rs): what came of it is printed as one JSON object.
'use strict';

const rhea = require('rhea');

const port = Number(process.argv[2]);
const SENT = 100;
// More than the credit of a link.
const SETTLED = 300;

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
  for (let index = 0; index < SETTLED; index += 1) {
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
      if (arrived.length === SETTLED) resolve();
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

// Bodies of many frames, whose parts all differ.
async function large() {
  const { connection } = await connect({ max_frame_size: 512 });
  const body = Array.from({ length: 50000 }, (_, number) => number).join(',');
  const bodies = [0, 1, 2].map((index) => `${index}:${body}`);
  const link = await sender(connection, 'large');
  for (const each of bodies) {
    if ((await outcome(link, each)) !== 'accepted') return false;
  }
  const arrived = await receive(connection, 'large', bodies.length, () => 'accept');
  connection.close();
  return JSON.stringify(arrived) === JSON.stringify(bodies);
}

// How many of 25 messages come with a credit of 10, of 5 more, and of many more.
async function credit(connection) {
  const link = await sender(connection, 'credit');
  for (let index = 0; index < 25; index += 1) await outcome(link, `${index}`);
  const receiver = connection.open_receiver({ source: 'credit', credit_window: 0 });
  await until(receiver, ['receiver_open']);
  let arrived = 0;
  let wanted = 0;
  let reached = () => {};
  receiver.on('message', () => {
    arrived += 1;
    if (arrived === wanted) reached();
  });
  const others = await sender(connection, 'others');
  const seen = [];
  for (const [more, target] of [[10, 10], [5, 15], [100, 25]]) {
    wanted = target;
    const enough = new Promise((resolve) => { reached = resolve; });
    receiver.add_credit(more);
    await enough;
    // Whatever the server would send too much comes before the outcomes of these.
    await outcome(others, 'x');
    await outcome(others, 'x');
    seen.push(arrived);
  }
  receiver.close();
  return seen;
}

// The error with which the server ends a link.
async function detached(connection) {
  const link = await sender(connection, '$detach');
  link.send({ body: 'x' });
  const { context } = await until(link, ['sender_error', 'accepted']);
  link.on('sender_error', () => {});
  return context.sender.error ? context.sender.error.condition : null;
}

// The error with which the server ends a connection.
async function ended() {
  const connection = rhea
    .create_container()
    .connect({ host: '127.0.0.1', port, reconnect: false });
  const link = await sender(connection, '$close');
  link.send({ body: 'x' });
  const { context } = await until(connection, ['connection_error', 'disconnected']);
  connection.on('connection_error', () => {});
  return context.connection.error ? context.connection.error.condition : null;
}

async function refusedReceiver(connection) {
  const link = connection.open_receiver({ source: '$forbidden' });
  const { context } = await until(link, ['receiver_error', 'message']);
  link.on('receiver_error', () => {});
  return context.receiver.error.condition;
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
  seen.large = await large();
  seen.credit = await credit(connection);
  seen.detached = await detached(connection);
  seen.ended = await ended();
  const queue = await sender(connection, 'q');
  const bodies = [];
  for (let index = 0; index < SENT; index += 1) bodies.push(`message ${index}`);
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
  seen.refused = [await sender(connection, '$forbidden'), await refusedReceiver(connection)];
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
