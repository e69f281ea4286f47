//! Keeps five ciphers that nobody uses out of the agent, 0.3 MB.
//!
//! The agent opens chunks with AEGIS-128L, of libaegis. When libaegis is set up, its `aegis_init` has each of its six ciphers pick
//! the code that suits the processor best, and so links all of them. The functions here stand in the place of the other
//! five's, and the linker then takes nothing else of these. If one of them were ever used, the linker would refuse
//! to link: two functions of one name.

/// Defines what libaegis declares as `int NAME(void)`; 0 says that all is well.
macro_rules! nothing_to_pick {
    ($($name:ident)*) => {$(
        // SAFETY: nobody else in the program has a function of this name (the linker would refuse it), and it is what
        // libaegis's `common.c` declares.
        #[allow(unsafe_code)]
        #[unsafe(no_mangle)]
        extern "C" fn $name() -> std::ffi::c_int {
            0
        }
    )*};
}

nothing_to_pick! {
    aegis128x2_pick_best_implementation
    aegis128x4_pick_best_implementation
    aegis256_pick_best_implementation
    aegis256x2_pick_best_implementation
    aegis256x4_pick_best_implementation
}
