#![no_main]
#![forbid(unsafe_code)]

claviger_fuzz::target!(tpm_public);
