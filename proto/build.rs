//! Compiles the stored records with protox and prost: no protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=src/records/records.proto");
    let files = protox::compile(["records.proto"], ["src/records"])?;
    // Bodies and encoded messages stay slices of the buffer they were read from.
    prost_build::Config::new()
        .bytes(["."])
        // They hold secrets: their Debug is written by hand.
        .skip_debug(["edgehub.v1.StoredIdentity", "edgehub.v1.StoredTwin"])
        .compile_fds(files)?;
    Ok(())
}
