//! Two SoftHSM2 tokens behind the faulty module, in this process.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, dead_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use claviger_faulty_token::{CONTROL_VARIABLE, MODULE_FILE, MODULE_VARIABLE, check};
use claviger_process::lock::lock;
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, Result, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;
use cryptoki_sys::{CK_RV, CKR_OK};
use tempfile::TempDir;

const SOFTHSM: &str = "/usr/lib/softhsm/libsofthsm2.so";
const PIN: &str = "123456";
/// Plaintext and signed text of the tests.
pub const TEXT: &[u8] = b"a key in transport";

/// One copy of the module, as an application sees it.
pub struct World {
    pub pkcs11: Pkcs11,
    /// The same library, for calls by symbol.
    direct: cryptoki_sys::Pkcs11,
    file: PathBuf,
    control: PathBuf,
}

/// A session on a token, with its keys.
pub struct Open<'a> {
    world: &'a World,
    pub session: Session,
    pub private: ObjectHandle,
    public: ObjectHandle,
}

/// Returns both copies of the module, in front of the same tokens, for one test at a time. They are initialised and without
/// faults.
pub fn worlds() -> (MutexGuard<'static, ()>, &'static World, &'static World) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    static WORLDS: OnceLock<(TempDir, World, World)> = OnceLock::new();
    let guard = lock(&ONE_AT_A_TIME);
    let (_, first, second) = WORLDS.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("softhsm2.conf");
        let tokens = dir.path().join("tokens");
        fs::create_dir(&tokens).unwrap();
        let text = "objectstore.backend = file\nlog.level = ERROR\n";
        fs::write(&conf, format!("directories.tokendir = {}\n{text}", tokens.display())).unwrap();
        set_var("SOFTHSM2_CONF", &conf);
        let first = World::load(dir.path(), "first", SOFTHSM.as_ref());
        first.initialize().unwrap();
        first.make_token("one");
        first.make_token("two");
        let copy = dir.path().join("softhsm-copy.so");
        fs::copy(SOFTHSM, &copy).unwrap();
        let second = World::load(dir.path(), "second", &copy);
        (dir, first, second)
    });
    for world in [first, second] {
        for file in ["one", "two", MODULE_FILE] {
            world.clear(file);
        }
        // An earlier test may have left any state.
        let _ = world.pkcs11.clone().finalize();
        world.initialize().unwrap();
    }
    (guard, first, second)
}

#[expect(clippy::disallowed_methods, reason = "the tests wait for each other in `worlds`")]
fn set_var(name: &str, value: &Path) {
    // SAFETY: only one test at a time is in `worlds`, so no thread reads the environment now.
    unsafe { std::env::set_var(name, value) };
}

impl World {
    fn load(dir: &Path, name: &str, real: &Path) -> Self {
        let control = dir.join(name);
        fs::create_dir(&control).unwrap();
        let built = std::env::current_exe().unwrap().with_file_name("libclaviger_faulty_token.so");
        let file = dir.join(format!("{name}.so"));
        fs::copy(built, &file).unwrap();
        set_var(MODULE_VARIABLE, real);
        set_var(CONTROL_VARIABLE, &control);
        let pkcs11 = Pkcs11::new(&file).unwrap();
        // SAFETY: the library is loaded already.
        let direct = unsafe { cryptoki_sys::Pkcs11::new(&file) }.unwrap();
        Self { pkcs11, direct, file, control }
    }

    pub fn initialize(&self) -> Result<()> {
        self.pkcs11.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
    }

    fn make_token(&self, label: &str) {
        let pin = AuthPin::new(PIN.into());
        let slots = self.pkcs11.get_slots_with_token().unwrap();
        let blank = |slot: &&Slot| !self.pkcs11.get_token_info(**slot).unwrap().token_initialized();
        self.pkcs11.init_token(*slots.iter().find(blank).unwrap(), &pin, label).unwrap();
        let session = self.pkcs11.open_rw_session(self.slot(label).unwrap()).unwrap();
        session.login(UserType::So, Some(&pin)).unwrap();
        session.init_pin(&pin).unwrap();
        session.logout().unwrap();
        session.login(UserType::User, Some(&pin)).unwrap();
        let public = [Attribute::Token(true), Attribute::ModulusBits(1024.into()), Attribute::Encrypt(true)];
        let private =
            [Attribute::Token(true), Attribute::Private(true), Attribute::Decrypt(true), Attribute::Sign(true)];
        session.generate_key_pair(&Mechanism::RsaPkcsKeyPairGen, &public, &private).unwrap();
    }

    /// Returns the slot of a token, if the token is present.
    pub fn slot(&self, label: &str) -> Option<Slot> {
        let slots = self.pkcs11.get_slots_with_token().unwrap();
        slots.into_iter().find(|slot| self.pkcs11.get_token_info(*slot).is_ok_and(|info| info.label() == label))
    }

    /// Opens a session, logs in and finds the keys.
    pub fn open(&self, label: &str) -> Open<'_> {
        let session = self.pkcs11.open_ro_session(self.slot(label).unwrap()).unwrap();
        match self.login(&session) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {}
            Err(error) => panic!("{error}"),
        }
        Open::with(self, session).unwrap()
    }

    pub fn login(&self, session: &Session) -> Result<()> {
        session.login(UserType::User, Some(&AuthPin::new(PIN.into())))
    }

    pub fn set(&self, file: &str, faults: &[&str]) {
        let text = faults.join("\n");
        check(&text, file == MODULE_FILE).unwrap();
        let new = self.control.join("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, self.control.join(file)).unwrap();
    }

    pub fn clear(&self, file: &str) {
        let _ = fs::remove_file(self.control.join(file));
    }

    /// Returns the directory of the control files and the statistics.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Returns a count of this process's statistics for a control file; it may be a little old.
    pub fn count(&self, file: &str, name: &str) -> u64 {
        let stats = self.control.join(format!("{file}.{}.stats", std::process::id()));
        let text = fs::read_to_string(stats).unwrap_or_default();
        let after = text.split_once(&format!("\"{name}\": ")).map_or("", |(_, after)| after);
        let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    }

    /// Waits until the count has this value.
    pub fn until_counted(&self, file: &str, name: &str, wanted: u64) {
        let begun = Instant::now();
        while self.count(file, name) != wanted {
            assert!(begun.elapsed() < Duration::from_secs(30), "{name} is {}", self.count(file, name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the path of the copy of the library.
    pub fn module_file(&self) -> &Path {
        &self.file
    }
}

/// Returns the only key of that class.
pub fn find(session: &Session, class: ObjectClass) -> Option<ObjectHandle> {
    session.find_objects(&[Attribute::Class(class)]).ok()?.first().copied()
}

impl<'a> Open<'a> {
    /// Returns the session with its keys; `None` if the keys are not found.
    pub fn with(world: &'a World, session: Session) -> Option<Self> {
        let private = find(&session, ObjectClass::PRIVATE_KEY)?;
        let public = find(&session, ObjectClass::PUBLIC_KEY)?;
        Some(Self { world, session, private, public })
    }

    pub fn encrypt(&self) -> Vec<u8> {
        self.session.encrypt(&Mechanism::RsaPkcs, self.public, TEXT).unwrap()
    }

    /// Calls `C_DecryptInit` and `C_Decrypt` once.
    pub fn decrypt(&self, ciphertext: &[u8]) -> std::result::Result<Vec<u8>, CK_RV> {
        self.session.decrypt_init(&Mechanism::RsaPkcs, self.private).map_err(|error| code(&error))?;
        let (mut input, mut output, mut len) = (ciphertext.to_vec(), vec![0; 256], 256);
        let decrypt = self.world.direct.C_Decrypt.as_ref().unwrap();
        // SAFETY: both buffers have the given lengths.
        let rv = unsafe {
            decrypt(self.session.handle(), input.as_mut_ptr(), input.len() as u64, output.as_mut_ptr(), &raw mut len)
        };
        output.truncate(usize::try_from(len).unwrap());
        if rv == CKR_OK { Ok(output) } else { Err(rv) }
    }

    /// Calls `C_SignInit` and `C_Sign` once.
    pub fn sign(&self) -> std::result::Result<Vec<u8>, CK_RV> {
        self.session.sign_init(&Mechanism::Sha256RsaPkcs, self.private).map_err(|error| code(&error))?;
        let (mut input, mut output, mut len) = (TEXT.to_vec(), vec![0; 256], 256);
        let sign = self.world.direct.C_Sign.as_ref().unwrap();
        // SAFETY: both buffers have the given lengths.
        let rv = unsafe {
            sign(self.session.handle(), input.as_mut_ptr(), input.len() as u64, output.as_mut_ptr(), &raw mut len)
        };
        output.truncate(usize::try_from(len).unwrap());
        if rv == CKR_OK { Ok(output) } else { Err(rv) }
    }

    pub fn verify(&self, signature: &[u8]) -> Result<()> {
        self.session.verify(&Mechanism::Sha256RsaPkcs, self.public, TEXT, signature)
    }

    /// Returns true if decryption and signing both work.
    pub fn well(&self) -> bool {
        let decrypted = self.decrypt(&self.encrypt());
        decrypted.is_ok_and(|text| text == TEXT) && self.sign().is_ok_and(|signature| self.verify(&signature).is_ok())
    }
}

/// Returns the return code of an error, for the errors that the tests provoke.
pub fn code(error: &Error) -> CK_RV {
    use cryptoki_sys::*;
    let Error::Pkcs11(error, _) = error else { panic!("{error}") };
    match error {
        RvError::GeneralError => CKR_GENERAL_ERROR,
        RvError::FunctionFailed => CKR_FUNCTION_FAILED,
        RvError::DeviceError => CKR_DEVICE_ERROR,
        RvError::DeviceRemoved => CKR_DEVICE_REMOVED,
        RvError::KeyHandleInvalid => CKR_KEY_HANDLE_INVALID,
        RvError::ObjectHandleInvalid => CKR_OBJECT_HANDLE_INVALID,
        RvError::PinIncorrect => CKR_PIN_INCORRECT,
        RvError::PinLocked => CKR_PIN_LOCKED,
        RvError::PinExpired => CKR_PIN_EXPIRED,
        RvError::SessionCount => CKR_SESSION_COUNT,
        RvError::SessionHandleInvalid => CKR_SESSION_HANDLE_INVALID,
        RvError::TokenNotPresent => CKR_TOKEN_NOT_PRESENT,
        RvError::UserNotLoggedIn => CKR_USER_NOT_LOGGED_IN,
        RvError::CryptokiNotInitialized => CKR_CRYPTOKI_NOT_INITIALIZED,
        other => panic!("{other:?}"),
    }
}
