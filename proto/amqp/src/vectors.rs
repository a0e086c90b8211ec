//! Bytes for tests: what clients send, composed by hand, and what hostile ones might.

/// Concatenates.
pub(crate) fn bytes(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn variable(code: u8, text: &[u8]) -> Vec<u8> {
    match u8::try_from(text.len()) {
        Ok(length) => bytes(&[&[code, length], text]),
        Err(_) => {
            let length = u32::try_from(text.len()).unwrap().to_be_bytes();
            bytes(&[&[code | 0x10], &length, text])
        }
    }
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    variable(0xa1, text.as_bytes())
}

pub(crate) fn symbol(text: &str) -> Vec<u8> {
    variable(0xa3, text.as_bytes())
}

pub(crate) fn binary(content: &[u8]) -> Vec<u8> {
    variable(0xa0, content)
}

/// A list (0xc0) or map (0xc1) in the form that holds it.
pub(crate) fn compound(code: u8, items: &[Vec<u8>]) -> Vec<u8> {
    let body = items.concat();
    match (u8::try_from(body.len() + 1), u8::try_from(items.len())) {
        (Ok(size), Ok(count)) => bytes(&[&[code, size, count], &body]),
        _ => {
            let size = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
            let count = u32::try_from(items.len()).unwrap().to_be_bytes();
            bytes(&[&[code | 0x10], &size, &count, &body])
        }
    }
}

pub(crate) fn list(items: &[Vec<u8>]) -> Vec<u8> {
    compound(0xc0, items)
}

pub(crate) fn map(items: &[Vec<u8>]) -> Vec<u8> {
    compound(0xc1, items)
}

pub(crate) fn described(code: u8, value: &[u8]) -> Vec<u8> {
    bytes(&[&[0x00, 0x53, code], value])
}

pub(crate) fn composite(code: u8, fields: &[Vec<u8>]) -> Vec<u8> {
    described(code, &list(fields))
}

pub(crate) fn null() -> Vec<u8> {
    vec![0x40]
}

pub(crate) fn open(properties: Vec<u8>) -> Vec<u8> {
    let mut fields = vec![string("c"), string("gw")];
    fields.resize(9, null());
    fields.push(properties);
    composite(0x10, &fields)
}

/// An attach of a sender without initial-delivery-count, as the C# client's.
pub(crate) fn attach(source: Vec<u8>, target: Vec<u8>, properties: Vec<u8>) -> Vec<u8> {
    let head = [
        string("l"),
        vec![0x43],
        vec![0x42],
        null(),
        null(),
        source,
        target,
    ];
    let mut fields = head.to_vec();
    fields.resize(13, null());
    fields.push(properties);
    composite(0x12, &fields)
}

pub(crate) fn source(fields: &[Vec<u8>]) -> Vec<u8> {
    composite(0x28, fields)
}

pub(crate) fn target(address: &str) -> Vec<u8> {
    composite(0x29, &[string(address)])
}

const SELECTOR: &str = "apache.org:selector-filter:string";

/// A source of a reader of an event hub: the filter described by a symbol or by its code.
pub(crate) fn selector(by_symbol: bool) -> Vec<u8> {
    let text = string("amqp.annotation.x-opt-offset > '@latest'");
    let filter = if by_symbol {
        bytes(&[&[0x00], &symbol(SELECTOR), &text])
    } else {
        bytes(&[b"\x00\x80\x00\x00\x01\x37\x00\x00\x00\x0c", &text])
    };
    let mut fields = vec![string("hub/ConsumerGroups/$Default/Partitions/0")];
    fields.resize(7, null());
    fields.push(map(&[symbol(SELECTOR), filter]));
    source(&fields)
}

/// A put-token request whose message-id has the encoding `id`.
pub(crate) fn put_token(id: &[u8], expiration: bool) -> Vec<u8> {
    let mut application = vec![
        string("operation"),
        string("put-token"),
        string("type"),
        string("servicebus.windows.net:sastoken"),
        string("name"),
        string("hub.azure-devices.net/devices/leaf1"),
    ];
    if expiration {
        application.push(string("expiration"));
        application.push(b"\x83\x00\x00\x01\x90\x00\x00\x00\x00".to_vec());
    }
    let token =
        "SharedAccessSignature sr=hub.azure-devices.net%2Fdevices%2Fleaf1&sig=c2ln&se=1900000000";
    bytes(&[
        &composite(
            0x73,
            &[id.to_vec(), null(), string("$cbs"), null(), string("cbs")],
        ),
        &described(0x74, &map(&application)),
        &described(0x77, &string(token)),
    ])
}

/// The PATCH of a C# client: its `version` annotation is null.
pub(crate) fn patch() -> Vec<u8> {
    let annotations = map(&[
        symbol("operation"),
        string("PATCH"),
        symbol("resource"),
        string("/properties/reported"),
        symbol("version"),
        null(),
    ]);
    let mut properties = vec![null(); 5];
    properties.push(string("Patch1b4e28ba-2fa1-11d2-883f-0016d3cca427"));
    bytes(&[
        &described(0x72, &annotations),
        &composite(0x73, &properties),
        &described(0x75, &binary(b"{\"fw\":\"2\"}")),
    ])
}

/// Two messages in a batch as the C client sends each message.
pub(crate) fn batch() -> Vec<u8> {
    let message = |body: &[u8]| {
        let properties = map(&[string("temp"), string("21")]);
        bytes(&[
            &described(0x74, &properties),
            &described(0x75, &binary(body)),
        ])
    };
    bytes(&[
        &described(0x75, &binary(&message(b"one"))),
        &described(0x75, &binary(&message(b"two"))),
    ])
}

/// A transfer of rhea's with a message behind it.
pub(crate) fn transfer() -> Vec<u8> {
    let fields = [
        vec![0x43],
        vec![0x52, 1],
        binary(b"1"),
        vec![0x43],
        vec![0x42],
    ];
    let properties = composite(
        0x73,
        &[null(), null(), string("/devices/leaf1/messages/events")],
    );
    bytes(&[
        &composite(0x14, &fields),
        &properties,
        &described(0x75, &binary(b"{\"t\":21}")),
    ])
}

/// Values that stand well in properties of open and attach and that decoders stumble over.
pub(crate) fn odd_values() -> Vec<Vec<u8>> {
    let odd: &[&[u8]] = &[
        b"\xe0\x02\x00\xa3",
        b"\xe0\x01\x00",
        b"\xe0\x02\x02\x40",
        b"\xe0\x02\x08\x40",
        b"\xe0\x02\x08\x45",
        b"\xe0\x04\x02\x56\x01\x00",
        b"\xe0\x08\x02\xc0\x02\x01\x40\x02\x01\x41",
        b"\xe0\x0a\x02\xe0\x03\x01\x50\x07\x03\x01\x50\x08",
        b"\xe0\x07\x02\x00\x53\x01\x50\x07\x08",
        b"\xe0\x08\x01\xc1\x05\x02\x54\x01\x54\x02",
        b"\x00\x53\x01\x00\x53\x02\x40",
        b"\x00\xa1\x01x\x54\x01",
        b"\x73\xff\xff\xff\xff",
        b"\x74\x00\x00\x00\x01",
        b"\x94\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01",
        b"\xc0\x08\x02\xe0\x02\x00\xa3\xc0\x01\x00",
        b"\xf0\x00\x00\x00\x05\xff\xff\xff\xff\x40",
    ];
    odd.iter().map(|value| value.to_vec()).collect()
}

/// `count` levels of lists and of described values within each other.
pub(crate) fn nested(count: usize) -> [Vec<u8>; 2] {
    let mut lists = Vec::new();
    for level in 0..count {
        let inner = u32::try_from((count - level - 1) * 9 + 5).unwrap();
        lists.extend_from_slice(&[0xd0]);
        lists.extend_from_slice(&inner.to_be_bytes());
        lists.extend_from_slice(&1u32.to_be_bytes());
    }
    lists.push(0x40);
    let mut described = b"\x00\x44".repeat(count);
    described.push(0x40);
    [lists, described]
}

/// Everything here, as a corpus.
pub(crate) fn all() -> Vec<Vec<u8>> {
    let sas = b"\x00leaf1@sas.hub\x00SharedAccessSignature sr=x&sig=y&se=1";
    let error = composite(0x1d, &[symbol("amqp:not-allowed"), string("no"), map(&[])]);
    let mut all = vec![
        open(null()),
        composite(0x11, &[null(), vec![0x43], vec![0x52, 9], vec![0x52, 9]]),
        attach(
            source(&[string("a")]),
            target("$cbs"),
            map(&[symbol("k"), string("v")]),
        ),
        attach(selector(true), target("x"), null()),
        attach(selector(false), null(), null()),
        attach(
            null(),
            composite(0x30, &[symbol("amqp:local-transactions")]),
            null(),
        ),
        composite(
            0x13,
            &[
                vec![0x43],
                vec![0x52, 9],
                vec![0x43],
                vec![0x52, 9],
                vec![0x43],
                vec![0x43],
                vec![0x52, 50],
                null(),
                vec![0x41],
                null(),
            ],
        ),
        transfer(),
        composite(
            0x15,
            &[
                vec![0x41],
                vec![0x43],
                null(),
                vec![0x41],
                composite(0x24, &[]),
            ],
        ),
        composite(
            0x15,
            &[
                vec![0x42],
                vec![0x43],
                vec![0x52, 7],
                vec![0x41],
                composite(0x25, std::slice::from_ref(&error)),
            ],
        ),
        composite(0x16, &[vec![0x43], vec![0x41], error.clone()]),
        composite(0x17, std::slice::from_ref(&error)),
        composite(0x18, &[error]),
        patch(),
        batch(),
        put_token(&string("7b0c"), true),
        put_token(&[0x44], false),
        put_token(&[&[0x98][..], &[7; 16]].concat(), false),
        composite(0x40, &[bytes(&[b"\xe0\x0c\x01\xa3\x09ANONYMOUS"])]),
        composite(0x41, &[symbol("PLAIN"), binary(sas), string("gw")]),
        composite(0x44, &[vec![0x50, 0], binary(b"Welcome!")]),
        sas.to_vec(),
    ];
    for odd in odd_values() {
        all.push(open(map(&[
            symbol("a"),
            odd.clone(),
            symbol("b"),
            string("c"),
        ])));
        let capabilities = [
            string("a"),
            null(),
            null(),
            null(),
            null(),
            null(),
            null(),
            null(),
            null(),
            odd.clone(),
            odd.clone(),
        ];
        all.push(attach(
            source(&[string("a")]),
            target("t"),
            map(&[symbol("a"), odd.clone()]),
        ));
        all.push(attach(
            source(&capabilities),
            target("t"),
            map(&[symbol("a"), odd]),
        ));
    }
    all.extend(nested(15));
    all.extend(nested(40));
    all
}
