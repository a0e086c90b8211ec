'use strict';
// The service side, driven as agent.js drives devices: azure-iothub (registry, twins, methods,
// cloud-to-device messages with feedback) and @azure/event-hubs (what devices sent), unmodified.
//
// The protocol is that of agent.js: one JSON command per line on standard input, one JSON line on
// standard output for each result and each event. SERVICE_CONNECTION_STRING is that of a policy of
// the IoT Hub, EVENT_HUB_CONNECTION_STRING that of its Event-Hubs-compatible end point. Who is
// trusted is said with NODE_EXTRA_CA_CERTS, as neither SDK has another way.
//
// Nothing connects before a command needs it. Ends when standard input closes.

const readline = require('node:readline');
const { parseArgs } = require('node:util');
const { Amqp, AmqpWs, Client, Registry } = require('azure-iothub');
const { Message } = require('azure-iot-device');
const {
  EventHubConsumerClient,
  earliestEventPosition,
  latestEventPosition,
} = require('@azure/event-hubs');

const { values: options } = parseArgs({
  options: { protocol: { type: 'string', default: 'amqp' } },
});

const say = (line) => process.stdout.write(JSON.stringify(line) + '\n');
const complain = (error) => say({ event: 'error', text: `${error.name}: ${error.message}` });

const connectionString = process.env.SERVICE_CONNECTION_STRING;
const registry = Registry.fromConnectionString(connectionString);
const transport = options.protocol === 'amqpws' ? AmqpWs : Amqp;
const client = Client.fromConnectionString(connectionString, transport);

const newConsumer = () => new EventHubConsumerClient(
  EventHubConsumerClient.defaultConsumerGroupName, process.env.EVENT_HUB_CONNECTION_STRING);
let asking = null;
const consumer = () => {
  asking = asking || newConsumer();
  return asking;
};
const readers = new Map();

// What the registry answers with has the HTTP response beside it.
const unwrap = ({ responseBody }) => responseBody;

// A twin object holds its registry, which has no place in JSON.
const plainTwin = ({ _registry, ...twin }) => twin;
const twinOf = (answer) => plainTwin(unwrap(answer));

const positionOf = ({ earliest, latest, sequence, inclusive, enqueued_ms: enqueuedOn }) => {
  if (earliest) return earliestEventPosition;
  if (latest) return latestEventPosition;
  if (sequence !== undefined) return { sequenceNumber: sequence, isInclusive: Boolean(inclusive) };
  return { enqueuedOn };
};

const eventOf = (reader, event) => ({
  event: 'telemetry',
  reader,
  // What is JSON, the SDK has read already.
  body: Buffer.isBuffer(event.body) ? event.body.toString('utf8') : event.body,
  sequence: event.sequenceNumber,
  offset: event.offset,
  enqueued_ms: event.enqueuedTimeUtc && event.enqueuedTimeUtc.getTime(),
  partition_key: event.partitionKey,
  properties: event.properties,
  system: event.systemProperties,
  message_id: event.messageId,
  correlation_id: event.correlationId,
  content_type: event.contentType,
});

const commands = {
  create_device: async ({ device }) => unwrap(await registry.create(device)),
  get_device: async ({ device }) => unwrap(await registry.get(device)),
  update_device: async ({ device }) => unwrap(await registry.update(device)),
  list_devices: async () => unwrap(await registry.list()),
  delete_device: async ({ device }) => {
    await registry.delete(device);
  },
  add_devices: async ({ devices }) => unwrap(await registry.addDevices(devices)),
  update_devices: async ({ devices, force }) => unwrap(await registry.updateDevices(devices, force)),
  remove_devices: async ({ devices, force }) => unwrap(await registry.removeDevices(devices, force)),
  statistics: async () => unwrap(await registry.getRegistryStatistics()),
  apply_configuration: async ({ device, content }) => {
    await registry.applyConfigurationContentOnDevice(device, content);
  },

  add_module: async ({ module }) => unwrap(await registry.addModule(module)),
  get_module: async ({ device, module }) => unwrap(await registry.getModule(device, module)),
  list_modules: async ({ device }) => unwrap(await registry.getModulesOnDevice(device)),
  update_module: async ({ module, force }) => unwrap(await registry.updateModule(module, force)),
  // By its ids, or as it was got: then its etag has to match.
  remove_module: async ({ device, module }) => {
    await (device
      ? registry.removeModule(device, module)
      // This form has no promise in the SDK.
      : new Promise((resolve, reject) =>
        registry.removeModule(module, (error) => (error ? reject(error) : resolve()))));
  },

  get_twin: async ({ device, module }) =>
    twinOf(await (module ? registry.getModuleTwin(device, module) : registry.getTwin(device))),
  update_twin: async ({ device, module, patch, etag }) =>
    twinOf(await (module
      ? registry.updateModuleTwin(device, module, patch, etag)
      : registry.updateTwin(device, patch, etag))),

  // Every page of the result, as a caller reads them who does not know how many there are.
  query: async ({ sql, page_size: pageSize, as_twin: asTwin }) => {
    const query = registry.createQuery(sql, pageSize);
    const pages = [];
    while (query.hasMoreResults) {
      const { result } = await (asTwin
        ? query.nextAsTwin()
        : query.next(query.continuationToken));
      pages.push(asTwin ? result.map(plainTwin) : result);
    }
    return pages;
  },

  invoke: async ({ device, module, request }) => {
    const { result } = await (module
      ? client.invokeDeviceMethod(device, module, request)
      : client.invokeDeviceMethod(device, request));
    return result;
  },

  open: async () => {
    client.on('disconnect', (result) =>
      say({ event: 'disconnected', text: result.reason ? String(result.reason) : null }));
    await client.open();
  },
  close: async () => {
    await client.close();
  },
  send: async (command) => {
    const message = new Message(command.body);
    message.messageId = command.message_id || '';
    message.correlationId = command.correlation_id || '';
    message.contentType = command.content_type;
    message.ack = command.ack;
    if (command.ttl_ms) message.expiryTimeUtc = Date.now() + command.ttl_ms;
    for (const [key, value] of Object.entries(command.properties || {})) {
      message.properties.add(key, value);
    }
    await client.send(command.device, message);
  },
  // settle: complete, abandon or reject; abandoned ones come again.
  watch_feedback: async ({ settle }) => {
    const { result: receiver } = await client.getFeedbackReceiver();
    receiver.on('message', (message) => {
      for (const record of JSON.parse(message.getData().toString('utf8'))) {
        say({
          event: 'feedback',
          record,
          user_id: message.userId && message.userId.toString(),
          content_type: message.contentType,
        });
      }
      receiver[settle || 'complete'](message).catch(complain);
    });
    receiver.on('error', complain);
  },

  event_hub: async () => consumer().getEventHubProperties(),
  partition_ids: async () => consumer().getPartitionIds(),
  partition: async ({ partition }) => consumer().getPartitionProperties(partition),
  // What it reads arrives as events with its name in them. A client of the SDK has one reader of
  // a partition, so each reader has a client.
  read: async ({ reader, partition, from }) => {
    const reading = newConsumer();
    reading.subscribe(
      partition,
      {
        processEvents: async (batch) => batch.forEach((event) => say(eventOf(reader, event))),
        processError: async (error) => complain(error),
      },
      { startPosition: positionOf(from), maxWaitTimeInSeconds: 1 },
    );
    readers.set(reader, reading);
  },
  stop_reading: async ({ reader }) => {
    const reading = readers.get(reader);
    readers.delete(reader);
    // Its subscription ends with it.
    await reading.close();
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
