//! `TPMS_ATTEST` of a quote: what a TPM signs about its PCRs.

use super::Malformed;
use super::reader::Reader;

/// `TPM_GENERATED_VALUE`: what only a TPM itself puts in front of what a restricted key signs.
const GENERATED: u32 = 0xff54_4347;
/// `TPM_ST_ATTEST_QUOTE`.
const ATTEST_QUOTE: u16 = 0x8018;
/// Longest name, nonce or digest.
const MAX_FIELD: usize = 128;
/// Most banks in a selection.
const MAX_BANKS: u32 = 16;

/// A quote that was read. Who signed it was not checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Quote<'a> {
    /// The nonce that the caller of `TPM2_Quote` gave.
    pub extra_data: &'a [u8],
    /// Times that the TPM was reset.
    pub reset_count: u32,
    /// Times that the TPM was restarted, or its state resumed, since it was reset. 0: nothing but a full boot.
    pub restart_count: u32,
    /// `TPML_PCR_SELECTION`, the bytes as signed.
    pub selection: &'a [u8],
    /// Digest of the selected PCRs' values.
    pub digest: &'a [u8],
}

impl<'a> Quote<'a> {
    /// Reads a `TPMS_ATTEST` that is a quote, to its last byte.
    ///
    /// # Errors
    /// [`Malformed`], also for other attestations than a quote.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.u32_be()? != GENERATED {
            return Err(Malformed("no TPM made this quote"));
        }
        if reader.u16_be()? != ATTEST_QUOTE {
            return Err(Malformed("it is another attestation than a quote"));
        }
        reader.sized(MAX_FIELD)?; // qualifiedSigner
        let extra_data = reader.sized(MAX_FIELD)?;
        reader.u64_be()?; // clock
        let reset_count = reader.u32_be()?;
        let restart_count = reader.u32_be()?;
        reader.u8()?; // safe
        reader.u64_be()?; // firmwareVersion
        let from_selection = reader.rest();
        let banks = reader.u32_be()?;
        if banks > MAX_BANKS {
            return Err(Malformed("the quote selects more than 16 banks"));
        }
        for _ in 0..banks {
            reader.u16_be()?;
            let bits = reader.u8()?;
            reader.take(usize::from(bits))?;
        }
        let length = from_selection.len() - reader.rest().len();
        let selection = from_selection.get(..length).unwrap_or_default();
        let digest = reader.sized(MAX_FIELD)?;
        reader.finish()?;
        Ok(Self { extra_data, reset_count, restart_count, selection, digest })
    }

    /// A quote as a TPM would sign it, for TPMs in software.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        let sized = |out: &mut Vec<u8>, field: &[u8]| {
            out.extend_from_slice(&(field.len() as u16).to_be_bytes());
            out.extend_from_slice(field);
        };
        out.extend_from_slice(&GENERATED.to_be_bytes());
        out.extend_from_slice(&ATTEST_QUOTE.to_be_bytes());
        sized(&mut out, &[]);
        sized(&mut out, self.extra_data);
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&self.reset_count.to_be_bytes());
        out.extend_from_slice(&self.restart_count.to_be_bytes());
        out.extend_from_slice(&[1]);
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(self.selection);
        sized(&mut out, self.digest);
        out
    }
}
