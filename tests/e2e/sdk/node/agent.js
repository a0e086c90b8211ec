'use strict';
// azure-iot-device as a process that does what it is told: one JSON command per line on standard
// input, one JSON line on standard output for each result and each event.
//
// The protocol is the same as that of sdk/python/agent.py. A command is {"id": 1, "do": "...", ...};
// its result {"id": 1, "ok": ...} or {"id": 1, "error": "..."}. What arrives unasked is
// {"event": "..."}. The SDK's own behaviour (reconnects, renewals of tokens, what is subscribed
// again) is left as it is.
//
// Ends when standard input closes.

const fs = require('node:fs');
const readline = require('node:readline');
const { parseArgs } = require('node:util');
const { Client, ModuleClient, Message } = require('azure-iot-device');
const { Amqp, AmqpWs } = require('azure-iot-device-amqp');
const { Mqtt, MqttWs } = require('azure-iot-device-mqtt');

const { values: options } = parseArgs({
  options: {
    ca: { type: 'string' },
    protocol: { type: 'string', default: 'mqtt' },
    'model-id': { type: 'string' },
    'token-ttl': { type: 'string' },
  },
});

const say = (line) => process.stdout.write(JSON.stringify(line) + '\n');

const connectionString = process.env.CONNECTION_STRING;
const isModule = connectionString.includes('ModuleId=');
const transport = { amqp: Amqp, amqpws: AmqpWs, mqtt: Mqtt, mqttws: MqttWs }[options.protocol];
const client = (isModule ? ModuleClient : Client).fromConnectionString(connectionString, transport);

let twin = null;
const getTwin = async () => {
  twin = twin || (await client.getTwin());
  return twin;
};

const messageOf = (body, properties) => {
  const message = new Message(body);
  for (const [key, value] of Object.entries(properties || {})) message.properties.add(key, value);
  return message;
};

const propertiesOf = (message) =>
  Object.fromEntries(message.properties.propertyList.map(({ key, value }) => [key, value]));

const arrived = (event, input, message) =>
  say({
    event,
    input,
    body: message.getData().toString('utf8'),
    message_id: message.messageId,
    properties: propertiesOf(message),
  });

const commands = {
  connect: async () => {
    const settings = { ca: fs.readFileSync(options.ca, 'utf8'), keepalive: 10 };
    if (options['model-id']) {
      settings.modelId = options['model-id'];
    }
    if (options['token-ttl']) {
      const seconds = Number(options['token-ttl']);
      settings.tokenRenewal = {
        tokenValidTimeInSeconds: seconds,
        tokenRenewalMarginInSeconds: Math.floor(seconds / 2),
      };
    }
    await client.setOptions(settings);
    client.on('connect', () => say({ event: 'connected' }));
    client.on('disconnect', () => say({ event: 'disconnected' }));
    client.on('error', (error) => say({ event: 'error', text: String(error) }));
    await client.open();
  },

  send: async ({ body, properties, output, message_id: messageId }) => {
    const message = messageOf(body, properties);
    message.contentType = 'application/json';
    message.contentEncoding = 'utf-8';
    if (messageId) message.messageId = messageId;
    await (output ? client.sendOutputEvent(output, message) : client.sendEvent(message));
  },

  // The SDK's twin object stays the same over reconnects; get() asks the hub again.
  get_twin: async () => {
    const current = await getTwin();
    await new Promise((resolve, reject) =>
      current.get((error) => (error ? reject(error) : resolve())));
    const { update, ...reported } = current.properties.reported;
    return { desired: current.properties.desired, reported };
  },

  patch_reported: async ({ patch }) => {
    const current = await getTwin();
    await new Promise((resolve, reject) =>
      current.properties.reported.update(patch, (error) => (error ? reject(error) : resolve())));
  },

  watch_desired: async () => {
    const current = await getTwin();
    let first = true;
    current.on('properties.desired', (patch) => {
      // The SDK tells what it has at once; only later changes are news.
      if (first) {
        first = false;
        return;
      }
      say({ event: 'desired', patch });
    });
  },

  answer_methods: async () => {
    const handle = (respond) => (request, response) => {
      say({ event: 'method', name: request.methodName, payload: request.payload });
      respond(request, response);
    };
    // One SDK, two names.
    const onMethod = (client.onMethod || client.onDeviceMethod).bind(client);
    onMethod('echo', handle((request, response) => {
      response.send(200, { echo: request.payload }).catch((error) =>
        say({ event: 'error', text: String(error) }));
    }));
    onMethod('unanswered', handle(() => {}));
  },

  // settle: complete, or over AMQP also reject or abandon.
  watch_c2d: async ({ settle }) => {
    client.on('message', (message) => {
      arrived('c2d', null, message);
      client[settle || 'complete'](
        message, (error) => error && say({ event: 'error', text: String(error) }));
    });
  },

  watch_inputs: async ({ output }) => {
    client.on('inputMessage', (input, message) => {
      arrived('input', input, message);
      const done = () =>
        client.complete(message, (error) => error && say({ event: 'error', text: String(error) }));
      if (!output) return done();
      const onward = messageOf(message.getData(), propertiesOf(message));
      client.sendOutputEvent(output, onward).then(done, (error) =>
        say({ event: 'error', text: String(error) }));
    });
  },

  invoke: async ({ request, device, module }) => {
    const result = await (module
      ? client.invokeMethod(device, module, request)
      : client.invokeMethod(device, request));
    return result;
  },

  disconnect: async () => {
    await client.close();
  },
};

const run = async (command) => {
  try {
    const result = await commands[command.do](command);
    say({ id: command.id, ok: result === undefined ? null : result });
  } catch (error) {
    say({ id: command.id, error: `${error.name}: ${error.message}` });
  }
};

const lines = readline.createInterface({ input: process.stdin });
lines.on('line', (line) => run(JSON.parse(line)));
lines.on('close', () => process.exit(0));
