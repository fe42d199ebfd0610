from disttrain.cli.main import main

main()
